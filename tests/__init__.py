"""A package, since a dependency installs a top-level `tests` of its own: `python -m tests.torture` means this one.

The files import each other by their bare names (pytest's `pythonpath`), so that each also runs as a script.
"""
