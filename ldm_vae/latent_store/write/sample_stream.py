"""The source's side of the pipeline: every sample of some units, in order, decoded once, as crops and a row.

Decoding happens in the workers of `ordered_loader`; a bad image arrives as its reason and never as an exception.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ldm_vae.data.ordered import Sample, ordered_loader
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Source, image_checksum
from ldm_vae.data.stamps import stamp_now
from ldm_vae.latent_store.format.layout import CLIP_FRAMES, IMAGE_BYTES, passed_on, tensor_name
from ldm_vae.latent_store.format.work_units import BadSample, Unit, storable
from ldm_vae.latent_store.write.crops import Cutting
from ldm_vae.latent_store.write.freshness_cache import Sightings, sighting


@dataclass(frozen=True)
class Ready:
    """One future row: the crops uint8 [C, H, W] by name, of clips [C, T, H, W], of sounds float32 [C, L], and the row
    of the parquet."""

    unit: Unit
    index: int
    crops: dict[str, torch.Tensor]
    row: dict[str, Any]

    @property
    def group(self) -> tuple[int, ...]:
        """Resolution, height and width, and of clips their frames: rows of one group share a shard."""
        height, width, *frames = size_of(self.crops[""])
        return int(self.row["resolution"]), height, width, *frames


def size_of(crop: torch.Tensor) -> tuple[int, ...]:
    """Height and width of a crop, and of a clip its frames; of an excerpt, a row, 1 and its samples."""
    if crop.ndim == 2:
        return 1, crop.shape[1]
    _, *frames, height, width = crop.shape
    return height, width, *frames


@dataclass(frozen=True)
class Dealt:
    """One sample of a unit: its rows (one per resolution) or why it has none; `last` closes the unit; its sighting, 0
    where it has none."""

    unit: Unit
    ready: list[Ready]
    bad: BadSample | None
    last: bool
    sighting: int


def samples(
    source: Source, name: str, cutting: Cutting, units: Sequence[Unit], batch_size: int, num_workers: int
) -> Iterator[Dealt]:
    """All samples of `units`, in order; the workers run ahead over the units' borders."""
    # the same order twice: the loader gets the indices, `places` says which unit each belongs to
    places = ((unit, index) for unit in units for index in unit.indices)
    indices = itertools.chain.from_iterable(unit.indices for unit in units)
    loader = ordered_loader(
        source,
        max(cutting.resolutions),
        cast(Sequence[int], indices),  # it is only iterated: 10^9 indices are not held
        batch_size=batch_size,
        num_workers=num_workers,
        view=cutting,
        draft_at_least=cutting.at_least,
    )
    for batch, bad in loader:
        good, reasons = {sample.index: sample for sample in batch}, iter(bad)
        # good and bad together are the batch, so positions and batches stay in step
        for unit, index in itertools.islice(places, len(batch) + len(bad)):
            sample = good.get(index)
            last = index == unit.indices[-1]
            if sample is not None:
                seen = sighting(sample.stamp, sample.checksum)
                yield Dealt(unit, _rows(sample, unit, name, cutting), None, last, seen)
            else:
                # before the bytes are read again for the checksum
                stamp = stamp_now(source, index)
                failed = bad_sample(source, index, next(reasons).reason)
                yield Dealt(unit, [], failed, last, sighting(stamp, failed.image_sha256))


def noted(stream: Iterable[Dealt], sightings: Sightings) -> Iterator[Dealt]:
    """The same samples; what was seen of them is remembered when their unit is through."""
    seen: list[int] = []
    for dealt in stream:
        seen.append(dealt.sighting)
        yield dealt
        if dealt.last:
            sightings.add(seen)
            seen = []


def bad_sample(source: Source, index: int, reason: str) -> BadSample:
    """The entry of quarantine.jsonl; the bytes are read once more for their checksum."""
    checksum = None
    with contextlib.suppress(BadImage):
        checksum = image_checksum(source[index].image)
    return BadSample(index=index, key=storable(source.key(index)), reason=reason, image_sha256=checksum)


def _rows(sample: Sample, unit: Unit, name: str, cutting: Cutting) -> list[Ready]:
    own = {
        "key": storable(sample.key),
        "source": name,
        "source_index": sample.index,
        "image_sha256": sample.checksum,
        IMAGE_BYTES: sample.bytes,
        "original_size": list(sample.crop.original_size),
    }
    rows, width = [], len(cutting.crops)
    for number, resolution in enumerate(cutting.resolutions):
        crops = dict(zip(cutting.crops, sample.views[number * width : (number + 1) * width], strict=True))
        height, wide, *frames = size_of(crops[""].pixels)
        geometry: dict[str, Any] = {"resolution": resolution, "bucket": f"{height}x{wide}"}
        if frames:
            geometry[CLIP_FRAMES] = frames[0]
        boxes = {tensor_name("crop_box", crop): list(cut.box) for crop, cut in crops.items()}
        pixels = {crop: cut.pixels for crop, cut in crops.items()}
        rows.append(Ready(unit, sample.index, pixels, {**own, **geometry, **boxes, **passed_on(sample.columns)}))
    return rows
