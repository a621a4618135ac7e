"""What a generation is asked for: text features, timing, and their combination."""
