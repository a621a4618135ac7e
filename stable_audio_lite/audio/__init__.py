"""Audio files in and out, and pictures of them."""
