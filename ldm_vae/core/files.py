"""Files and transfers that somebody else has made: read whole, they are plain files of bounded size; on their way, they
have bounded bytes and do not stand still."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

SMALL = 2**24  # bytes of what describes one thing: a network, a run, a recipe; the largest known has 10^5
LARGEST = 2**29  # of what has a line for each sample or shard: a manifest of 5 * 10^9 latents has 232 MB

WINDOW = 60.0  # seconds in which a transfer has to bring
LEAST = 2**16  # bytes, a fifth of a modem's


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. Raises OSError for anything but a plain file: a FIFO would wait, a device has no end."""
    # without O_NONBLOCK the opening of a FIFO waits for a writer; of a plain file it changes nothing
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{Path(path).name}: not a plain file")
    return file


def read_bytes(path: str | os.PathLike[str], largest: int = SMALL) -> bytes:
    """Read a file whole. Raises OSError as `open_plain`, and when it has more than `largest` bytes."""
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise OSError(f"{Path(path).name}: expected at most {largest:,} bytes, got {size:,}")
        return file.read()


def read_text(path: str | os.PathLike[str], largest: int = SMALL) -> str:
    """Read a file of UTF-8 whole. Raises OSError as `read_bytes`, ValueError when it is something else."""
    return read_bytes(path, largest).decode("utf-8")


class OversizeError(Exception):
    """The other side sends more than it should."""


class StalledError(Exception):
    """The other side sends next to nothing."""


class Transfer:
    """Bounds of a transfer that is under way, told of each piece that came.

    Args:
        largest: bytes that may come, as they are after decoding; None is no bound (a stream).
    """

    def __init__(self, largest: int | None) -> None:
        self.largest, self.bytes = largest, 0
        self._came, self._waited = 0, 0.0  # in this window

    def add(self, size: int, seconds: float) -> None:
        """A piece of `size` bytes for which `seconds` were waited. Raises OversizeError, StalledError."""
        self.bytes += size
        if self.largest is not None and self.bytes > self.largest:
            raise OversizeError(f"expected at most {self.largest:,} bytes, more are sent")
        self._came += size
        self._waited += seconds
        if self._waited >= WINDOW:
            if self._came < LEAST:
                raise StalledError(f"{self._came:,} bytes came in {self._waited:.0f} s: it stands still")
            self._came, self._waited = 0, 0.0
