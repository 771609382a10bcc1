"""Loaders: the crops of a training stream, and the images of a source in order.

    for batch in training_loader(source, TransformConfig(), 256, seed=0, batch_size=16):
        pixels = to_pixels(batch.pixels.to(device, non_blocking=True))

What a batch holds depends on (seed, epoch, index) only: tasks come from the sampler in the main process, every draw is
keyed, and workers use one thread. Pixels cross the process border as uint8, one tensor a batch.

Legend: B batch, C channels, R resolution.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ldm_vae import keyed
from ldm_vae.data import sampler
from ldm_vae.data.decoding import read_image
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.sampler import Task
from ldm_vae.data.source import Source, image_checksum
from ldm_vae.data.transforms import Crop, Resolution, TransformConfig, centre_crop, random_crop
from ldm_vae.errors import UsageError, WorkError

PATIENCE = 10_000  # bad images in a row after which a disk is missing rather than images damaged


@dataclass
class Batch:
    """One rank's part of a global batch.

    pixels uint8 [B, C, R, R]; positions, epochs, indices int64 [B]; keys of the images in the batch; original_sizes
    int64 [B, 2] (H, W); boxes int64 [B, 4] (top, left, height, width) in the original's pixels; flipped bool [B];
    bad: images that could not be used on the way, their slots filled by the next index that could.
    """

    pixels: torch.Tensor
    positions: torch.Tensor
    epochs: torch.Tensor
    indices: torch.Tensor
    keys: list[str]
    original_sizes: torch.Tensor
    boxes: torch.Tensor
    flipped: torch.Tensor
    bad: list[Bad] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Called by DataLoader: only the pixels are worth a page-locked buffer."""
        self.pixels = self.pixels.pin_memory()
        return self


class ImageDataset(Dataset[Batch]):
    """Tasks => batches, in the worker: read, decode, crop, stack. Picklable as far as its source is."""

    def __init__(self, source: Source, transform: TransformConfig, resolution: Resolution, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.resolution = resolution
        self.seed = seed
        self._known_bad: set[int] = set()

    def __getitems__(self, tasks: Sequence[Task]) -> Batch:
        bad: list[Bad] = []
        indices, keys, crops = [], [], []
        for task in tasks:
            index, key, crop = self._usable(task, bad)
            indices.append(index)
            keys.append(key)
            crops.append(crop)
        return Batch(
            pixels=torch.stack([crop.pixels for crop in crops]),
            positions=torch.tensor([task.position for task in tasks]),
            epochs=torch.tensor([task.epoch for task in tasks]),
            indices=torch.tensor(indices),
            keys=keys,
            original_sizes=torch.tensor([crop.original_size for crop in crops]),
            boxes=torch.tensor([crop.box for crop in crops]),
            flipped=torch.tensor([crop.flipped for crop in crops]),
            bad=bad,
        )

    def _usable(self, task: Task, bad: list[Bad]) -> tuple[int, str, Crop]:
        """The image of the task, or the next by index that can be used; those that cannot are added to `bad`."""
        count = len(self.source)
        for step in range(min(count, PATIENCE)):
            index = (task.index + step) % count
            if index in self._known_bad:
                continue
            try:
                key, crop = self.crop(task.epoch, index)
                return index, key, crop
            except BadImage as error:
                self._known_bad.add(index)
                bad.append(Bad(self.source.key(index), error.reason))
        what = "no usable image" if count <= PATIENCE else f"{PATIENCE:,} images in a row cannot be used"
        last = f"; the last is {bad[-1].key} ({bad[-1].reason})" if bad else ""
        raise WorkError(f"{what} among {count:,}{last}")

    def crop(self, epoch: int, index: int) -> tuple[str, Crop]:
        """(key, crop) of one image in one epoch: depends on (seed, epoch, index) only. Raises BadImage."""
        record = self.source[index]
        generator = keyed.generator(self.seed, "augmentation", epoch, index)
        smallest = self.resolution if isinstance(self.resolution, int) else max(self.resolution)
        at_least = None if self.transform.resize == "none" else round(smallest * self.transform.scale[1])
        image = read_image(record.image, self.source.decoding, at_least)
        crop = random_crop(image.pixels, self.resolution, self.transform, generator, image.original_size)
        return record.key, crop


def training_loader(
    source: Source,
    transform: TransformConfig,
    resolution: Resolution,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Batch]:
    """The endless stream of this rank's training batches.

    Args:
        batch_size: images per rank; the global batch is world_size times that.
        start_position: images of the whole stream, over all ranks, that are behind us: the first batch starts there.
        num_workers: processes that read and decode; 0 does it in this one. Changes nothing in the batches.
        multiprocessing_context: fork, spawn or forkserver; the platform's default if None.

    Raises:
        WorkError: while iterating, when no image can be used.
    """
    dataset = ImageDataset(source, transform, resolution, seed)
    tasks = sampler.batches(
        seed,
        len(source),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start_position=start_position,
    )
    return _load(dataset, tasks, num_workers, pin_memory, prefetch_factor, multiprocessing_context)


# --- in order ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image of an ordered pass: its index, key, views (the crops of it), other columns, SHA-256 as stored."""

    index: int
    key: str
    views: tuple[Crop, ...]
    columns: dict[str, Any]
    checksum: str

    @property
    def crop(self) -> Crop:
        """The first view, and the only one unless `view` says otherwise."""
        return self.views[0]


View = Callable[[torch.Tensor, tuple[int, int]], tuple[Crop, ...]]


def centre_view(image: torch.Tensor, original_size: tuple[int, int], resolution: Resolution) -> tuple[Crop, ...]:
    """The view of evaluation and encoding."""
    return (centre_crop(image, resolution, original_size),)


class _OrderedDataset(Dataset[tuple[list[Sample], list[Bad]]]):
    def __init__(self, source: Source, view: View) -> None:
        self.source = source
        self.view = view

    def __getitems__(self, indices: Sequence[int]) -> _Packed:
        good: list[Sample] = []
        bad: list[Bad] = []
        for index in indices:
            try:
                record = self.source[index]
                image = read_image(record.image, self.source.decoding)
                views = self.view(image.pixels, image.original_size)
                good.append(Sample(index, record.key, views, record.columns, image_checksum(record.image)))
            except BadImage as error:
                bad.append(Bad(self.source.key(index), error.reason))
        return _Packed.of(good, bad)


@dataclass(frozen=True)
class _Packed:
    """A batch of samples on its way between processes: all pixels in one tensor, since each tensor costs a file."""

    buffer: torch.Tensor
    shapes: list[tuple[int, ...]]
    good: list[Sample]
    bad: list[Bad]

    @classmethod
    def of(cls, good: list[Sample], bad: list[Bad]) -> _Packed:
        pixels = [crop.pixels for sample in good for crop in sample.views]
        buffer = torch.cat([image.reshape(-1) for image in pixels]) if pixels else torch.empty(0, dtype=torch.uint8)
        nothing = torch.empty(0, dtype=torch.uint8)
        stripped = [
            dataclasses.replace(sample, views=tuple(dataclasses.replace(crop, pixels=nothing) for crop in sample.views))
            for sample in good
        ]
        return cls(buffer, [tuple(image.shape) for image in pixels], stripped, bad)

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
    source: Source,
    resolution: Resolution,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int,
    num_workers: int = 0,
    view: View | None = None,
    allow_draft: bool = False,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[tuple[list[Sample], list[Bad]]]:
    """Every index once, in order: (samples, bad images) for each `batch_size` indices; together they are the batch.

    Args:
        indices: which images, in which order; all if None.
        view: (image uint8 [C, H, W], original size) => crops; a centre crop at `resolution` if None. Several views of
            an image share one decode. With workers it must be picklable.
        allow_draft: whether a source with jpeg_draft is taken.

    Raises:
        UsageError: the source decodes with jpeg_draft and that is not allowed.
    """
    if source.decoding.jpeg_draft and not allow_draft:
        raise UsageError("data.jpeg_draft: for training only; these pixels would be 50 dB off and compare with nothing")
    chosen = range(len(source)) if indices is None else indices
    slices = ([int(index) for index in chosen[at : at + batch_size]] for at in range(0, len(chosen), batch_size))
    dataset = _OrderedDataset(source, view or functools.partial(centre_view, resolution=resolution))
    packed = _load(dataset, slices, num_workers, False, prefetch_factor, multiprocessing_context)
    return (batch.unpack() for batch in packed)


# --- workers ----------------------------------------------------------------------------------------------------------


class _Failure:
    """A WorkError on its way out of a worker: raised there it would arrive as a traceback in a string."""

    def __init__(self, error: WorkError) -> None:
        self.error = str(error)


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, tasks: Any) -> Any:
        try:
            return self.dataset.__getitems__(tasks)
        except WorkError as error:
            return _Failure(error)


def _same(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process saves first and then ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # a spawned worker that ends while its queue's thread is inside torch aborts the process and frightens the parent
    atexit.register(os._exit, 0)


def _load(
    dataset: Any, tasks: Iterable[Any], num_workers: int, pin_memory: bool, prefetch_factor: int, context: str | None
) -> Iterator[Any]:
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=tasks,
        collate_fn=_same,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=context if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without one of its own it draws from the global generator
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise WorkError(batch.error)
        yield batch
