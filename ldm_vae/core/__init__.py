"""Foundations that everything stands on: configuration, errors, randomness, files, processes."""
