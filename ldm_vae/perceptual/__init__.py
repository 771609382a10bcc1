"""Frozen networks and similarity maps that losses and metrics share."""
