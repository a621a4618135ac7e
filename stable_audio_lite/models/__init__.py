"""The networks: VAE, discriminator, U-Net and CLAP."""
