"""Inventory of a training run's images: the keys, sizes, stamps and, as far as GIGABYTE goes, contents of its images.

A run that goes on with other pictures under the same names is not the run that its config and its first checkpoints
tell of. Its images are looked at once when it begins and compared whenever it goes on: keys, then sizes, then stamps
(`stamps.py`); where a stamp is another (a copied folder, a touched file) the contents, as far as they were read.

Legend: N images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ldm_vae.core import atomic_io
from ldm_vae.core.progress import Progress
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Source, image_bytes, image_checksum
from ldm_vae.data.stamps import Sizes, Stamps, chunks_of, key_numbers, stamp_now, stamps_of

GIGABYTE = 10**9  # of images are read when a run begins: a second or two from a local disk
TENSORS = ("keys", "stamps", "contents", "bytes")


@dataclass
class Inventory:
    """Inventory of N images: hashes of their keys, stamps (0: none), the first 8 bytes of their SHA-256 (0: not read),
    all uint64; and sizes in bytes, int64 (-1: unknown)."""

    keys: Stamps
    stamps: Stamps
    contents: Stamps
    bytes: Sizes

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {name: torch.from_numpy(getattr(self, name).view(np.int64)) for name in TENSORS}
        atomic_io.replace(path, atomic_io.data(save(tensors)))

    @classmethod
    def load(cls, path: Path) -> Inventory | None:
        """Read an inventory; None when it is absent or damaged."""
        try:
            tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
            keys, stamps, contents = (tensors[name].view(np.uint64) for name in TENSORS[:3])
            found = cls(keys, stamps, contents, tensors["bytes"])
        except (OSError, SafetensorError, KeyError):
            return None
        return found if len({len(getattr(found, name)) for name in TENSORS}) == 1 else None


@dataclass(frozen=True)
class Difference:
    """Difference between the images of a run when it began and now."""

    changed: int = 0
    """Of the same name, with other contents."""
    first: str = ""
    """The key of the first of them, or of the first new one."""
    new: int = 0
    gone: int = 0
    unknown: int = 0
    """Of the same name and size, in a file that was copied, replaced or touched: nobody knows."""

    def __bool__(self) -> bool:
        return bool(self.changed or self.new or self.gone or self.unknown)

    def __str__(self) -> str:
        parts = [
            f"{self.changed:,} have changed" if self.changed else "",
            f"{self.new:,} are new" if self.new else "",
            f"{self.gone:,} are gone" if self.gone else "",
            f"{self.unknown:,} of the same size were copied or touched and may have changed" if self.unknown else "",
        ]
        return ", ".join(part for part in parts if part) + (f" (the first: {self.first})" if self.first else "")


def take_inventory(source: Source) -> Inventory:
    """Take the inventory of the images as they are now. Raises UsageError for keys that are not those of one each."""
    found = _look(source)
    budget = GIGABYTE
    with Progress(total=len(source), desc="inventory", unit="images", leave=False) as bar:
        for index in range(len(source)):
            if budget <= 0:
                break
            found.contents[index], size = _content(source, index, found.stamps)
            found.bytes[index] = size if found.bytes[index] < 0 else found.bytes[index]
            budget -= max(size, 1)
            bar.update()
    return found


def compare(before: Inventory, source: Source) -> tuple[Difference, Inventory]:
    """Changes since, and `before` with the stamps that those images have now which are what they were."""
    now = _look(source)
    order = np.argsort(before.keys, kind="stable")
    # for each image of now the place in `before` of the same key, or of another one that `known` rules out
    at = order[np.searchsorted(before.keys[order], now.keys).clip(max=len(order) - 1)]
    known = before.keys[at] == now.keys
    had = before.bytes[at]
    resized = known & (had >= 0) & (now.bytes >= 0) & (had != now.bytes)
    # another stamp, or none: the contents decide, where they were read when the run began
    doubt = known & ~resized & ((now.stamps == 0) | (now.stamps != before.stamps[at]))
    changed, unknown = resized.copy(), doubt & (before.contents[at] == 0)
    for index in Progress(np.flatnonzero(doubt & ~unknown).tolist(), "compare", unit="images", leave=False):
        content, _ = _content(source, index, now.stamps)
        if content and content != before.contents[at[index]]:  # one that cannot be read now is the quarantine's
            changed[index] = True
        elif content:
            before.stamps[at[index]] = now.stamps[index]
    others = np.flatnonzero(changed | ~known)
    first = source.key(int(others[0])) if len(others) else ""
    gone = len(before.keys) - len(np.intersect1d(before.keys, now.keys))
    return Difference(int(changed.sum()), first, int((~known).sum()), gone, int(unknown.sum())), before


def _look(source: Source) -> Inventory:
    count = len(source)
    nothing = np.zeros(count, np.uint64)
    found = Inventory(key_numbers(source), nothing.copy(), nothing, np.zeros(count, np.int64))
    with Progress(total=count, desc="images", unit="images", leave=False) as bar:
        for indices, stamps, sizes in stamps_of(source, chunks_of(range(count))):
            own = slice(indices[0], indices[-1] + 1)
            found.stamps[own], found.bytes[own] = stamps, sizes
            bar.update(len(indices))
    return found


def _content(source: Any, index: int, stamps: Stamps) -> tuple[int, int]:
    """The first 8 bytes of the SHA-256 and the size of an image as it is now, whose stamp is written down; (0, 0) of
    one that cannot be read."""
    stamps[index] = stamp_now(source, index)
    try:
        image = source[index].image
    except BadImage:
        return 0, 0
    return int(image_checksum(image)[:16], 16), image_bytes(image)
