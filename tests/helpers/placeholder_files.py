"""Files in the place of weights: a pointer of Git LFS, a page that asks for a password."""

from __future__ import annotations

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 334643276\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
