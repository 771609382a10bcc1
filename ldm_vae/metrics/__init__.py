"""How good a reconstruction is: one file per metric, each `update(pair)` and `compute()` over all ranks."""
