"""A training run: its folder, checkpoints, averages, optimisers and log."""
