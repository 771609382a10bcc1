"""Stores at a URL: the local cache and a whole copy."""
