"""Copies among images: one picture in other bytes, sizes or formats, found by a perceptual hash; among clips by their
first frames, among sounds by a picture of each (sound_copies.py).

The hash is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1):
the lowest 8 x 8 frequencies of the DCT of a grey thumbnail of 32 x 32, each above their median or not. Alone it takes
most handwritten digits for copies of one another, so the same frequencies must also agree in grey levels. Of 1,797
digits, 200 faces and 920 tiles of photographs then no two were taken for copies; of scikit-image's 26 pictures two,
which are one chessboard in grey and in RGB. Of 260 copies of those (1/8 to twice the side, JPEG of quality 30 and more,
WebP of 60) 250 were found. A crop, a rotation or a repainted colour is another picture.

Legend: n, m images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from ldm_vae.core.progress import Progress
from ldm_vae.data import sound_copies
from ldm_vae.data.clips import first_frame
from ldm_vae.data.ordered import batches_of, items
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Source
from ldm_vae.data.workers import load

SIDE, LOWEST = 32, 8  # of the thumbnail; frequencies in each direction
BITS = LOWEST * LOWEST
MOST_BITS = 10  # of 64 in which the hashes of copies differ, as published
MOST_LEVELS = 4.0  # of 255: root mean square difference of the thumbnails' lowest frequencies
DRAFT = 2 * SIDE  # pixels of the short side that are enough of a JPEG
AT_ONCE = 2**22  # pairs that are compared at once: 16 MB a matrix; 10 ns a pair on one core


def _cosines() -> torch.Tensor:
    """The lowest rows [8, 32] of the orthonormal DCT-II."""
    order, place = torch.arange(LOWEST)[:, None], torch.arange(SIDE)[None]
    rows = torch.cos(torch.pi * (place + 0.5) * order / SIDE)
    return torch.nn.functional.normalize(rows, dim=1)


COSINES = _cosines()


def frequencies(image: torch.Tensor) -> torch.Tensor:
    """The lowest frequencies fp16 [64] of an image uint8 [C, H, W]; the distance of two is in grey levels."""
    grey: torch.Tensor = resize(image, [SIDE, SIDE], antialias=True).float().mean(0)
    return torch.einsum("ij,jk,lk->il", COSINES, grey, COSINES).flatten().div(SIDE).half()


class _Thumbnails(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        # sounds and clips have none
        draft = source.decoding.signal == "image"
        self.source, self.decoding = source, replace(source.decoding, jpeg_draft=draft)

    def __getitems__(self, work: Sequence[tuple[int, None]]) -> torch.Tensor:
        return torch.stack([self._look(index) for index, _ in work])

    def _look(self, index: int) -> torch.Tensor:
        try:
            image = self.source[index].image
            if self.decoding.signal == "audio":
                return frequencies(sound_copies.picture(image, self.decoding))
            return frequencies(first_frame(image, self.decoding, DRAFT).pixels)
        except BadImage:  # like nothing
            return torch.full((BITS,), torch.nan, dtype=torch.half)


def look(source: Source, indices: range, num_workers: int) -> torch.Tensor:
    """The frequencies fp16 [n, 64] of consecutive images; NaN of one that cannot be read."""
    found = [torch.empty(0, BITS, dtype=torch.half)]
    with Progress(total=len(indices), desc="copies", unit="img", leave=False) as bar:
        for batch in load(_Thumbnails(source), batches_of(items(source, indices), 16), num_workers):
            found.append(batch)
            bar.update(len(batch))
    return torch.cat(found)


def matches(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, whether each of those rows [k, m] is a copy of each of `theirs`), a block of rows at a time; n * m
    comparisons.

    Args:
        ours, theirs: frequencies [n, 64], [m, 64], on one device.
    """
    rows = max(1, AT_ONCE // max(1, len(theirs)))
    theirs, their_bits = theirs.float(), _bits(theirs)
    for first in range(0, len(ours), rows):
        block = ours[first : first + rows].float()
        same = _bits(block) @ their_bits.T >= BITS - 2 * MOST_BITS
        # few rows have any: their grey levels are compared for these alone
        near = same.any(1)
        same[near] &= torch.cdist(block[near], theirs) <= MOST_LEVELS
        yield first, same


def _bits(found: torch.Tensor) -> torch.Tensor:
    """The hash as 64 numbers 1 and -1, whose product over two images counts the bits that differ."""
    found = found.float()
    return torch.where(found > found.median(1, keepdim=True).values, 1.0, -1.0)
