"""Weights from other programs: which files of a folder are read, their real format, whose tensors are in them and under
which names, and the cost of 8-bit floats. Whatever does not fit is one sentence."""
