"""The autoencoder: built, loaded, wrapped for training, and its latents."""
