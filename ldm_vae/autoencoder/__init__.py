"""The autoencoder: building, loading, the wrapper for training, and its latents."""
