"""Ordered pass: every image of a source once, in order, for evaluation and encoding.

    for samples, bad in ordered_loader(source, 256, batch_size=16, num_workers=4):

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm_vae.core.errors import UsageError
from ldm_vae.data.clips import View, crops_of
from ldm_vae.data.flags import Resize
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.ranges import ENOUGH, Values, Watch
from ldm_vae.data.source import Record, Source, image_bytes, image_checksum
from ldm_vae.data.stamps import stamp_now
from ldm_vae.data.stream import Stream, length
from ldm_vae.data.transforms import Crop, Resolution, centre_crop
from ldm_vae.data.workers import load


@dataclass(frozen=True)
class Sample:
    """One image or clip of an ordered pass: its index, key, views (the crops of it), other columns, SHA-256 and size in
    bytes as stored, and its stamp from before it was read (`stamps.stamp_now`)."""

    index: int
    key: str
    views: tuple[Crop, ...]
    columns: dict[str, Any]
    checksum: str
    bytes: int
    stamp: int

    @property
    def crop(self) -> Crop:
        """The first view, and the only one unless `view` says otherwise."""
        return self.views[0]


def centre_view(
    image: torch.Tensor,
    original_size: tuple[int, int],
    resolution: Resolution,
    resize: Resize = "short_side",
    alpha: bool = False,
) -> tuple[Crop, ...]:
    """The view of evaluation and encoding."""
    return (centre_crop(image, resolution, original_size, resize, alpha),)


IndexedRecord = tuple[int, Record | Bad | None]
"""Index of an image; of a stream also what was read there."""


def items(source: Source | Stream, indices: Sequence[int] | None = None) -> Iterator[IndexedRecord]:
    """Items to read, in order. Raises UsageError for chosen indices of a stream."""
    if not isinstance(source, Stream):
        return ((int(index), None) for index in (range(len(source)) if indices is None else indices))
    if indices is not None:
        raise UsageError("data: a stream is read in order, from its beginning; single images cannot be chosen")
    return enumerate(iter(source))


def batches_of(found: Iterator[IndexedRecord], batch_size: int) -> Iterator[list[IndexedRecord]]:
    """Consecutive lists of `batch_size`, the last one shorter."""
    return iter(lambda: list(itertools.islice(found, batch_size)), [])


def take(source: Source | None, item: IndexedRecord) -> Record:
    """The record of an item, read now unless it came with it. Raises BadImage."""
    index, record = item
    if isinstance(record, Bad):
        raise BadImage(record.reason)
    if record is None:
        assert source is not None
        record = source[index]
    return record


def key_of(source: Source | None, item: IndexedRecord) -> str:
    """The key of an item."""
    index, record = item
    if record is None:
        assert source is not None
        return source.key(index)
    return record.key


class _OrderedDataset(Dataset[tuple[list[Sample], list[Bad]]]):
    def __init__(self, source: Source | Stream, view: View, at_least: int | None) -> None:
        self.decoding = source.decoding
        # a stream is read in the main process, its records come with the work
        self.source: Any = None if isinstance(source, Stream) else source
        self.view = view
        self.at_least = at_least
        self.looked = 0

    def __getitems__(self, work: Sequence[IndexedRecord]) -> _Packed:
        good: list[Sample] = []
        bad: list[Bad] = []
        values: list[Values] = []
        for item in work:
            try:
                # before the bytes are read, so that the stamp belongs to them or to older ones
                stamp = stamp_now(self.source, item[0])
                record = take(self.source, item)
                views, image = crops_of(record.image, self.decoding, self.view, at_least=self.at_least)
                # of the bytes in the source, not of the pixels: a store is compared with these
                checksum = image_checksum(record.image), image_bytes(record.image)
                good.append(Sample(item[0], record.key, views, record.columns, *checksum, stamp))
                # the smallest and largest values cost a pass over the image; ENOUGH images of each worker tell the
                # range
                if self.looked < ENOUGH:
                    self.looked += 1
                    values.append(image.values)
            except BadImage as error:
                bad.append(Bad(key_of(self.source, item), error.reason))
        return _Packed.of(good, bad, values)


@dataclass(frozen=True)
class _Packed:
    """A batch of samples on its way between processes: all pixels in one tensor, since each tensor costs a file."""

    buffer: torch.Tensor
    shapes: list[tuple[int, ...]]
    good: list[Sample]
    bad: list[Bad]
    values: list[Values]

    @classmethod
    def of(cls, good: list[Sample], bad: list[Bad], values: list[Values]) -> _Packed:
        # good samples travel without pixels, which `unpack` gives back in the same order
        pixels = [crop.pixels for sample in good for crop in sample.views]
        nothing = torch.empty(0, dtype=torch.uint8)
        buffer = torch.cat([image.reshape(-1) for image in pixels]) if pixels else nothing
        stripped = [
            dataclasses.replace(sample, views=tuple(dataclasses.replace(crop, pixels=nothing) for crop in sample.views))
            for sample in good
        ]
        return cls(buffer, [tuple(image.shape) for image in pixels], stripped, bad, values)

    def unpack(self) -> tuple[list[Sample], list[Bad]]:
        flat = torch.split(self.buffer, [math.prod(shape) for shape in self.shapes])
        pixels = iter([part.view(shape) for part, shape in zip(flat, self.shapes, strict=True)])
        return [
            dataclasses.replace(
                sample, views=tuple(dataclasses.replace(crop, pixels=next(pixels)) for crop in sample.views)
            )
            for sample in self.good
        ], self.bad


def ordered_loader(
    source: Source | Stream,
    resolution: Resolution,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int,
    num_workers: int = 0,
    view: View | None = None,
    draft_at_least: int | None = None,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[tuple[list[Sample], list[Bad]]]:
    """Load every index once, in order: (samples, bad images) for each `batch_size` indices; together they are the
    batch.

    Args:
        indices: which images, in which order; all if None (of a stream, only all).
        view: (image, or frame of a clip, uint8 [C, H, W], original size) => crops; a centre crop at `resolution` if
            None. Several views of an image share one decode. With workers it must be picklable.
        draft_at_least: short side, in pixels, that is enough for the views of a source with jpeg_draft; None refuses
            such a source.

    Raises:
        UsageError: the source decodes with jpeg_draft and that is not allowed; chosen indices of a stream.
    """
    if source.decoding.jpeg_draft and draft_at_least is None:
        raise UsageError(
            "data.jpeg_draft: measured pixels are decoded exactly, the draft is 50 dB off and compares with nothing"
        )
    # by index, not by good image: a bad image makes its batch smaller and moves no other image
    slices = batches_of(items(source, indices), batch_size)
    decoding = source.decoding
    centred = functools.partial(centre_view, resolution=resolution, resize=decoding.resize, alpha=decoding.alpha)
    dataset = _OrderedDataset(source, view or centred, draft_at_least)
    packed = load(dataset, slices, num_workers, False, prefetch_factor, multiprocessing_context)
    return _watched(packed, Watch(source, length(source)))


def _watched(packed: Iterator[_Packed], watch: Watch) -> Iterator[tuple[list[Sample], list[Bad]]]:
    for batch in packed:
        watch.add(batch.values)
        yield batch.unpack()
    # a short source ends before enough images were met: judged by all of them
    watch.judge()
