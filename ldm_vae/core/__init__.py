"""Foundations of the package: configuration, errors, randomness, files, processes."""
