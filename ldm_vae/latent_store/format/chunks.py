"""Rows of a shard that are in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

CHUNK_ROWS = 256
CHUNK_VALUES = 2**23  # of clips: one row of five seconds at 480 lines has two million


def chunk_rows(shape: Sequence[int]) -> int:
    """Rows of this shape that are in memory at a time: fewer of clips [c, t, h, w] than of images."""
    return CHUNK_ROWS if len(shape) < 4 else max(1, min(CHUNK_ROWS, CHUNK_VALUES // math.prod(shape)))
