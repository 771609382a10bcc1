"""Quarantine of unusable images: each is kept with its key and its reason, none is dropped silently.

A bad image never kills a run by itself. `Quarantine` counts them, warns above 1 %, stops the run above `max_bad`, and
when nothing at all is usable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm_vae.core.errors import WorkError
from ldm_vae.core.files import LARGEST, read_bytes
from ldm_vae.core.text import lines
from ldm_vae.core.validation import parse_json

logger = logging.getLogger(__name__)

WARN_ABOVE = 0.01  # share of bad images above which the user is told once


class BadImage(Exception):
    """Raised for bytes that cannot become an image; `reason` says why, in words for quarantine.jsonl."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return BadImage, (self.reason,)


@dataclass(frozen=True)
class Bad:
    """One image that was not used: its key in the source and the reason."""

    key: str
    reason: str


class Quarantine:
    """The bad images of one run, each counted once however often it is met.

    Args:
        total: images in the source; the share of bad ones is taken of it. None (a stream): of the images met so far.
        max_bad: the share above which `add` stops the run; 1.0 never does, 0.0 stops at the first.
        path: a quarantine.jsonl to append to, one line `{"key": ..., "reason": ...}` each. Lines are written in one
            call, so several processes may share the file; what it holds already is not written again.
    """

    def __init__(self, total: int | None, *, max_bad: float = 1.0, path: str | os.PathLike[str] | None = None) -> None:
        self.total = total
        self.max_bad = max_bad
        self.good = 0
        self.bad: dict[str, str] = {}
        self._path = None if path is None else Path(path)
        self._written = set() if self._path is None else {bad.key for bad in read_quarantine(self._path)}
        self._warned = False

    @property
    def count(self) -> int:
        """Bad images so far."""
        return len(self.bad)

    def add(self, bad: Iterable[Bad], good: int = 0) -> None:
        """Take up the bad images of a batch and the number of its good ones.

        Raises:
            WorkError: the share of bad images is above `max_bad`.
        """
        self.good += good
        new = [entry for entry in bad if entry.key not in self.bad]
        if not new:
            return
        for entry in new:
            self.bad[entry.key] = entry.reason
            logger.info("quarantined %s: %s", entry.key, entry.reason)
        self._write(new)
        self._judge()

    def finish(self) -> None:
        """Judge the whole pass; to be called when every image was met.

        Raises:
            WorkError: not one image was usable, or (of a stream) too many were not.
        """
        if not self.good:
            raise WorkError(f"no usable image: {self._summary()}" if self.bad else "no usable image: the data is empty")
        if self.total is None and self.count > self.max_bad * (self.good + self.count):
            self._stop()

    def _judge(self) -> None:
        # of a stream the share is known only so far: 1,000 images before one is believed
        met = self.total if self.total is not None else max(self.good + self.count, 1000)
        if self.count > self.max_bad * met:
            self._stop()
        if not self._warned and self.count > WARN_ABOVE * met:
            self._warned = True
            logger.warning("more than %.0f %% of the images cannot be used: %s", WARN_ABOVE * 100, self._summary())

    def _stop(self) -> None:
        raise WorkError(f"max_bad {self.max_bad:g}: too many images cannot be used: {self._summary()}")

    def _summary(self) -> str:
        key, reason = next(iter(self.bad.items()))
        of = "" if self.total is None else f" of {self.total:,}"
        more = "" if self._path is None else f"; all are in {self._path}"
        return f"{self.count:,}{of} are bad, the first is {key} ({reason}){more}"

    def _write(self, new: Iterable[Bad]) -> None:
        if self._path is None:
            return
        written = [json.dumps(asdict(entry)) + "\n" for entry in new if entry.key not in self._written]
        if written:
            with self._path.open("ab", buffering=0) as file:  # O_APPEND and one call: lines of two ranks never mix
                file.write("".join(written).encode())


def read_quarantine(path: str | os.PathLike[str]) -> list[Bad]:
    """The entries of a quarantine.jsonl, each key once; a line cut off by a crash is left out; no file, no entries."""
    entries: dict[str, Bad] = {}
    if Path(path).exists():
        for line in lines(read_bytes(path, LARGEST).decode(errors="replace")):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                raw = parse_json(line)
                entries.setdefault(str(raw["key"]), Bad(str(raw["key"]), str(raw["reason"])))
    return list(entries.values())
