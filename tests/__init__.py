"""A package, since a dependency installs a top-level `tests` of its own: `python -m tests.torture` means this one.

What several files use lies in helpers/, whose modules are imported by their bare names (pytest's `pythonpath`); a test
file imports no other.
"""
