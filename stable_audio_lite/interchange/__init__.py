"""Systems and VAEs from stable-audio-tools and diffusers, and back: their configs, names of tensors and files."""
