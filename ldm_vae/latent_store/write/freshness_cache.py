"""Sightings of images that are what a store says: a side file that spares the next check their bytes.

A sighting is 8 bytes: the stamp of an image (`data/stamps.py`) xor the first 8 bytes of the SHA-256 of what was read
under it. So it says something of the image alone, true whatever becomes of the store: these bytes lay there at that
stamp. Files of sightings lie beside the store, in `.NAME.seen/` (of a URL: in the cache folder of this machine), never
in it (it holds no time of anything), one for each process that wrote any. Lost, torn or deleted they cost time: images
are read again. Of 10^9 sightings one takes a changed image for another once in 10^10.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import WorkError
from ldm_vae.core.paths import cache_dir
from ldm_vae.latent_store.storage.places import Place

KIND = np.dtype("<u8")
SUFFIX = ".u64"

Numbers = npt.NDArray[np.uint64]


def sighting(stamp: int, checksum: str | None) -> int:
    """Sighting of an image with this stamp and SHA-256; 0 when there is nothing to remember."""
    return stamp ^ int(checksum[:16], 16) if stamp and checksum else 0


class Sightings:
    """The sightings of one store."""

    def __init__(self, store: Place) -> None:
        if isinstance(store, Path):
            place = Path(os.path.abspath(store))
            self.folder = place.with_name(f".{place.name}.seen")
        else:
            self.folder = cache_dir() / "seen" / hashlib.sha256(store.encode()).hexdigest()[:32]
        self._own = self.folder / f"{secrets.token_hex(8)}{SUFFIX}"

    def read(self) -> Numbers:
        """All sightings, ascending; none when they cannot be read."""
        found = [np.empty(0, KIND)]
        for path in self._files():
            with contextlib.suppress(OSError):
                # a kill while appending leaves an incomplete last number
                data = path.read_bytes()
                found.append(np.frombuffer(data[: len(data) // KIND.itemsize * KIND.itemsize], KIND))  # a torn end
        return np.unique(np.concatenate(found)).astype(np.uint64)

    def add(self, found: Iterable[int]) -> None:
        """Add sightings; those that cannot be written are lost."""
        numbers = np.array([number for number in found if number], dtype=KIND)
        if len(numbers):
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self._own, "ab") as file:
                    file.write(numbers.tobytes())

    def keep(self, found: Numbers) -> None:
        """Replace all sightings by these."""
        # the new file first: a kill in between leaves sightings twice, which `read` makes one
        others = [path for path in self._files() if path != self._own]
        with contextlib.suppress(OSError, WorkError):
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_io.replace(self._own, atomic_io.data(np.unique(found[found != 0]).astype(KIND).tobytes()))
            for path in others:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == SUFFIX)
        except OSError:
            return []
