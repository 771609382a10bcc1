"""Splits of sources by key."""

from __future__ import annotations

import numpy as np

from ldm_vae.data.holdout import numbers_of, parts_of, record_of
from ldm_vae.data.source import Source

NOTHING = np.empty(0, np.uint64)  # left out


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def split(source: Source, share: float) -> tuple[list[str], list[str]]:
    """Keys that train and keys that are held out."""
    numbers = numbers_of(source)
    train, held = parts_of(source, numbers, record_of(numbers, share, NOTHING))
    return keys(train), keys(held)
