"""Ranges of values: those that become black and white, and a warning where the images use hardly any of it.

A number type says it by itself where its numbers are made for pictures: bool, uint8, uint16, and floats in [0, 1]. Of
any other (int16 of a scanner, int64 of a list) nothing can be assumed: `value_range` has to say it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ldm_vae.core.errors import UsageError

logger = logging.getLogger(__name__)

Range = tuple[float, float]

FIELD = "data.value_range (--value_range)"
LEAST_USE = 0.1  # 12 bits kept in 16 use 6 % of them: a picture of 16 greys
ENOUGH = 100  # images whose values are looked at, in each process: one may be a night; a hundred cost nothing


def own_range(dtype: np.dtype[Any]) -> Range | None:
    """The values of a number type that become black and white; None where the type alone does not tell."""
    if dtype.kind in "bf":
        return 0.0, 1.0
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 0.0, 255.0 if dtype.itemsize == 1 else 65535.0
    return None


def check_range(value_range: Range | None) -> None:
    """Raises UsageError for a range of no width, or without an end."""
    if value_range is not None:
        black, white = value_range
        if black == white or not (math.isfinite(black) and math.isfinite(white)):
            raise UsageError(f"{FIELD}: expected two different finite numbers, got [{black:g}, {white:g}]")


@dataclass(frozen=True)
class Values:
    """low and high: the smallest and the largest value of an image; black and white: those that become 0 and 255."""

    counted: ClassVar[str] = "images"

    low: float
    high: float
    black: float
    white: float

    def __or__(self, other: Values) -> Values:
        """Range of values of both images, which have one range."""
        return Values(min(self.low, other.low), max(self.high, other.high), self.black, self.white)

    @property
    def use(self) -> float:
        """The part of the range between low and high."""
        first, last = min(self.black, self.white), max(self.black, self.white)
        return (min(self.high, last) - max(self.low, first)) / (last - first)

    def __str__(self) -> str:
        return f"[{self.low:.10g}, {self.high:.10g}] of [{self.black:.10g}, {self.white:.10g}]"

    def advice(self) -> str:
        """Advice where hardly any of the range is used: a sentence without its end that says what would use it, else
        empty."""
        if self.use >= LEAST_USE:
            return ""
        if self.low == self.high:
            return f"nothing of the range; see {FIELD}"
        black, white = self.low, self.high
        whole = float(black).is_integer() and float(white).is_integer()
        if whole and 0 <= black <= LEAST_USE * white:  # numbers of so many bits
            black, white = 0, 2 ** math.ceil(math.log2(white + 1)) - 1
        return f"less than a tenth of the range; value_range [{black:.10g}, {white:.10g}] would use it all: see {FIELD}"


def by_range(found: Iterable[Values]) -> list[Values]:
    """The values of many images: one for each range, in the order in which they came."""
    merged: dict[Range, Values] = {}
    for values in found:
        key = (values.black, values.white)
        merged[key] = merged[key] | values if key in merged else values
    return list(merged.values())


_SAID: set[tuple[str, float, float]] = set()  # a source is read more than once in a run


class Watch:
    """Warns, once for a source and a range in a process, when the images that were met use less than a tenth of it."""

    def __init__(self, source: Any, total: int | None) -> None:
        """total: images that there are, None of a stream."""
        self._name = getattr(source, "name", type(source).__name__)
        self._enough = ENOUGH if total is None else min(total, ENOUGH)
        self._found: list[Values] | None = []

    def add(self, found: Iterable[Values]) -> None:
        """Take up the values of some images; judges when they are enough."""
        if self._found is not None:
            self._found += found
            if len(self._found) >= self._enough:
                self.judge()

    def judge(self) -> None:
        """Mark the watch as done: all was met, or enough."""
        for values in by_range(self._found or ()):
            key = (self._name, values.black, values.white)
            if (advice := values.advice()) and key not in _SAID:
                _SAID.add(key)
                count = len(self._found or ())
                first = f"the first {count} {values.counted}"
                logger.warning("data %s: %s have values in %s: %s", self._name, first, values, advice)
        self._found = None
