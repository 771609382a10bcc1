"""Training of an autoencoder: the step, its objective and adversary, its config and data."""
