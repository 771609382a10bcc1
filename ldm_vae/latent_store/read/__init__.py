"""Reading of a store: datasets, loaders, pictures."""
