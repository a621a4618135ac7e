"""Data sets: items of audio with captions, random crops, cached latents."""
