"""The networks: VAEs and their discriminator, U-Nets, a transformer, and the conditioner."""
