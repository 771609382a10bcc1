"""Writing of a store: from samples to finished units."""
