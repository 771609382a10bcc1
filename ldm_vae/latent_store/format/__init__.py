"""The format of a store: its files, records and statistics."""
