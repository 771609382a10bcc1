"""Maintenance of finished stores: verify, repair, merge, split, describe."""
