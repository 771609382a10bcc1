"""Conversion of stores to other programs' formats and back."""
