"""Metrics of reconstructions: one file per metric, each `update(pair)` and `compute()` over all ranks."""
