"""`eval.scale`: nodes that fail and requests that fail, simulated and in closed form; the tables of docs/scale.md."""
