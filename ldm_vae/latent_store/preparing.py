"""One decode per image, whatever is made of it: bytes => checksum, columns and the crops that will be encoded.

Runs in the workers of a torch DataLoader; a bad image comes back as its reason and never as an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm_vae.data.decoding import read_image
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Source, image_checksum
from ldm_vae.data.transforms import Crop, centre_crop
from ldm_vae.latent_store.units import BadSample, Unit, storable

OWN_COLUMNS = ("key", "source", "source_index", "original_size", "crop_box", "bucket", "image_sha256")


@dataclass(frozen=True)
class Prepared:
    """A usable image: pixels uint8 [C, H, W] and its row of the parquet."""

    index: int
    pixels: torch.Tensor
    row: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of one unit; `last` closes the unit."""

    unit: Unit
    good: list[Prepared]
    bad: list[BadSample]
    last: bool


class _Preparing(Dataset[Any]):
    def __init__(self, source: Source, name: str, resolutions: Sequence[int]) -> None:
        self._source, self._name, self._resolutions = source, name, tuple(resolutions)

    def __getitem__(self, index: int) -> list[Prepared] | BadSample:
        checksum = None
        try:
            record = self._source[index]
            checksum = image_checksum(record.image)
            image = read_image(record.image, self._source.decoding)
            row = own_row(record.key, self._name, index, checksum)
            crops = [centre_crop(image.pixels, side, image.original_size) for side in self._resolutions]
        except BadImage as bad:
            return BadSample(
                index=index, key=storable(self._source.key(index)), reason=bad.reason, image_sha256=checksum
            )
        passed_on = {name if name not in OWN_COLUMNS else f"source_{name}": v for name, v in record.columns.items()}
        return [Prepared(index, crop.pixels.contiguous(), {**row, **geometry(crop), **passed_on}) for crop in crops]

    def __getitems__(self, indices: Sequence[int]) -> list[list[Prepared] | BadSample]:
        return [self[index] for index in indices]


def own_row(key: str, source: str, index: int, checksum: str) -> dict[str, Any]:
    """The columns that every store has, but for the geometry."""
    return {"key": storable(key), "source": source, "source_index": index, "image_sha256": checksum}


def geometry(crop: Crop) -> dict[str, Any]:
    """original_size [H, W], crop_box [top, left, height, width] in original pixels, and bucket HxW of the crop."""
    height, width = crop.pixels.shape[1:]
    return {"original_size": list(crop.original_size), "crop_box": list(crop.box), "bucket": f"{height}x{width}"}


def batches(
    source: Source, name: str, resolutions: Sequence[int], units: Sequence[Unit], batch_size: int, num_workers: int
) -> Iterator[Batch]:
    """All samples of `units`, in order, in batches that never cross a unit's border; workers run ahead over borders."""
    chunks = _Chunks(units, batch_size)
    loader = DataLoader(
        _Preparing(source, name, resolutions),
        batch_sampler=chunks,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        prefetch_factor=4 if num_workers else None,
    )
    for (unit, first), items in zip(chunks.places(), loader, strict=True):
        good = [prepared for item in items if not isinstance(item, BadSample) for prepared in item]
        bad = [item for item in items if isinstance(item, BadSample)]
        yield Batch(unit, good, bad, first + batch_size >= len(unit.indices))


class _Chunks(Sampler[list[int]]):
    """The batch sampler: lists of source indices, made as they are asked for (10^9 samples are 10^7 lists)."""

    def __init__(self, units: Sequence[Unit], batch_size: int) -> None:
        self._units, self._batch_size = units, batch_size

    def places(self) -> Iterator[tuple[Unit, int]]:
        """Each batch's unit and its first slot there."""
        for unit in self._units:
            for first in range(0, len(unit.indices), self._batch_size):
                yield unit, first

    def __iter__(self) -> Iterator[list[int]]:
        for unit, first in self.places():
            yield list(unit.indices[first : first + self._batch_size])


def _as_it_is(items: list[Any]) -> list[Any]:
    return items
