"""Weights that somebody else saved: which files of a folder are read, what a file really is, whose tensors are in it
and under which names, and what 8-bit floats cost. Everything that does not fit is one sentence."""
