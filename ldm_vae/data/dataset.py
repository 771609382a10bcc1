"""Loaders: the crops of a training stream (here), and the images of a source in order (ordered.py).

    for batch in training_loader(source, TransformConfig(), 256, seed=0, batch_size=16):
        pixels = to_pixels(batch.pixels.to(device, non_blocking=True))

What a batch holds depends on (seed, epoch, index) only: tasks come from the sampler in the main process, every draw is
keyed, and workers use one thread. Pixels cross the process border as uint8, one tensor a batch.

Legend: B batch, C channels, T frames of a clip, R resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import buckets as aspect_buckets
from ldm_vae.data import sampler, stream
from ldm_vae.data.buckets import Assignment
from ldm_vae.data.clips import TooShort, crops_of
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.ordered import Sample, ordered_loader
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.ranges import ENOUGH, Values, Watch
from ldm_vae.data.sampler import Work
from ldm_vae.data.source import Record, Source
from ldm_vae.data.stream import Stream
from ldm_vae.data.transforms import Crop, Resolution, TransformConfig, random_crop
from ldm_vae.data.workers import load

__all__ = ["Batch", "ImageDataset", "Sample", "ordered_loader", "training_loader"]

MOST_BAD_IN_A_ROW = 10_000  # bad images in a row after which a disk is missing rather than images damaged


@dataclass
class Batch:
    """One rank's part of a global batch.

    pixels uint8 [B, C, R, R], of clips [B, C, T, R, R], of sounds float32 [B, C, L]; positions, epochs, indices int64
    [B]; keys of the images in the batch; original_sizes int64 [B, 2] (H, W); boxes int64 [B, 4] (top, left, height,
    width) in the original's pixels; flipped bool [B]; bad: images that could not be used on the way, their slots filled
    by the next index that could; values: of the first images that a worker decodes.
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
    values: list[Values] = field(default_factory=list)

    def moments_on(self, _: torch.device) -> None:
        """None: images have no stored moments, their encoder makes them; batches of a latent store have them."""

    def pin_memory(self) -> Batch:
        """Pin the pixels, for DataLoader; nothing else is worth page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())


class ImageDataset(Dataset[Batch]):
    """Work => batches, in the worker: read, decode, crop, stack. Picklable as far as its source is."""

    def __init__(self, source: Source | Stream, transform: TransformConfig, resolution: Resolution, seed: int) -> None:
        self.decoding: Decoding = source.decoding
        # a stream is read in the main process: its records come with the work
        self.source: Source | None = None if isinstance(source, Stream) else source
        self.transform = transform
        self.resolution = resolution
        self.seed = seed
        self._known_bad: set[int] = set()
        self._values: list[Values] = []  # of the batch that is being made
        self._looked = 0

    def __getitems__(self, work: Work) -> Batch | list[Bad]:
        """The batch; of a stream of which nothing in the work was usable, the bad images."""
        bad = list(work.bad)
        self._values = []
        chosen = []
        for number, task in enumerate(work.tasks):
            found = self._usable(work, number, bad)
            # of a stream a worker has no more than this work
            if found is None:
                return bad
            index, record_key, crop = found
            chosen.append((task, index, record_key, crop))
        if len(lengths := {crop.pixels.shape[1] for *_, crop in chosen if crop.pixels.ndim == 4}) > 1:
            raise UsageError(
                f"data.frames: a batch has clips of {' and '.join(map(str, sorted(lengths)))} frames; images and "
                "videos mix by buckets, which a stream cannot have"
            )
        return Batch(
            pixels=torch.stack([crop.pixels for *_, crop in chosen]),
            positions=torch.tensor([task.position for task, *_ in chosen]),
            epochs=torch.tensor([task.epoch for task, *_ in chosen]),
            indices=torch.tensor([index for _, index, *_ in chosen]),
            keys=[key for *_, key, _ in chosen],
            original_sizes=torch.tensor([crop.original_size for *_, crop in chosen]),
            boxes=torch.tensor([crop.box for *_, crop in chosen]),
            flipped=torch.tensor([crop.flipped for *_, crop in chosen]),
            bad=bad,
            values=self._values,
        )

    def _usable(self, work: Work, number: int, bad: list[Bad]) -> tuple[int, str, Crop] | None:
        """(index, key, crop) of task `number`, or of the next image that can be used: by index, or in the work of a
        stream. Those that cannot are added to `bad`."""
        epoch = work.tasks[number].epoch
        for index, record in self._candidates(work, number):
            # met before by this worker: neither read nor reported again
            if index in self._known_bad:
                continue
            try:
                return self._crop(epoch, index, record, work.shape)
            except BadImage as error:
                # it has a bucket of its own
                if isinstance(error, TooShort) and len(work.shape or ()) == 3:
                    continue
                # a video that is damaged in one place may be used at another, whatever this worker has met
                if self.decoding.signal == "image":
                    self._known_bad.add(index)
                key = record.key if record is not None else self._key(index)
                bad.append(Bad(key, error.reason))
        if self.source is None:
            return None
        count = len(self.source)
        what = (
            "no usable image" if count <= MOST_BAD_IN_A_ROW else f"{MOST_BAD_IN_A_ROW:,} images in a row cannot be used"
        )
        last = f"; the last is {bad[-1].key} ({bad[-1].reason})" if bad else ""
        raise WorkError(f"{what} among {count:,}{last}")

    def _candidates(self, work: Work, number: int) -> Iterator[tuple[int, Record | None]]:
        if self.source is None:
            # a worker has no more of the stream than this work: its other images stand in
            for task in work.tasks[number:] + work.tasks[:number]:
                yield task.index, task.record
            return
        count = len(self.source)
        for step in range(min(count, MOST_BAD_IN_A_ROW)):
            # the next index: the same choice for any number of processes and workers
            yield (work.tasks[number].index + step) % count, None

    def _key(self, index: int) -> str:
        assert self.source is not None
        return self.source.key(index)

    def _crop(
        self, epoch: int, index: int, record: Record | None, shape: tuple[int, ...] | None
    ) -> tuple[int, str, Crop]:
        """(index, key, crop) of one image in one epoch: depends on (seed, epoch, index) only. Raises BadImage."""
        if record is None:
            assert self.source is not None
            record = self.source[index]
        decoding, draw = self.decoding, None
        if shape is not None and len(shape) == 3:
            decoding = replace(decoding, frames=shape[0])
        if decoding.signal != "image":
            draw = float(rng.generator(self.seed, "clip", epoch, index).random())
        resolution: Resolution = self.resolution if shape is None else (shape[-2], shape[-1])
        longest = resolution if isinstance(resolution, int) else max(resolution)
        at_least = None if self.transform.resize == "none" else round(longest * self.transform.scale[1])

        def view(pixels: torch.Tensor, original_size: tuple[int, int]) -> tuple[Crop, ...]:
            # drawn anew for each frame of a clip, which are cut alike
            generator = rng.generator(self.seed, "augmentation", epoch, index)
            return (random_crop(pixels, resolution, self.transform, generator, original_size, self.decoding.alpha),)

        (crop,), image = crops_of(record.image, decoding, view, at_least=at_least, draw=draw)
        if shape is not None and len(shape) == 3 and crop.pixels.shape[1] != shape[0]:
            raise TooShort(f"an image among clips of {shape[0]} frames")
        # looking costs a pass over the image, and the first ones tell the range
        if self._looked < ENOUGH:
            self._looked += 1
            self._values.append(image.values)
        return index, record.key, crop


def training_loader(
    source: Source | Stream,
    transform: TransformConfig,
    resolution: Resolution,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    num_workers: int = 0,
    buckets: Assignment | None = None,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Batch]:
    """The endless stream of this rank's training batches.

    Args:
        batch_size: images per rank; the global batch is world_size times that.
        start_position: images of the whole stream, over all ranks, that are behind us: the first batch starts there.
        num_workers: processes that read and decode; 0 does it in this one. Changes nothing in the batches.
        buckets: the shape of every image's crop (`buckets.assign`); each global batch then has one shape.
        multiprocessing_context: fork, spawn or forkserver; the platform's default if None.

    Raises:
        UsageError: buckets of a stream.
        WorkError: while iterating, when no image can be used.
    """
    layout: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "start_position": start_position,
    }
    if isinstance(source, Stream):
        if buckets is not None:
            raise UsageError("data: aspect buckets need the size of every image beforehand; a stream cannot give it")
        tasks = stream.batches(source, seed, **layout)
    elif buckets is not None:
        tasks = aspect_buckets.batches(buckets, seed, **layout)
    else:
        tasks = sampler.batches(sampler.Order(seed, len(source)), **layout)
    dataset = ImageDataset(source, transform, resolution, seed)
    packed = load(dataset, tasks, num_workers, pin_memory, prefetch_factor, multiprocessing_context)
    return _batches(packed, Watch(source, stream.length(source)))


def _batches(loaded: Iterator[Batch | list[Bad]], watch: Watch) -> Iterator[Batch]:
    """Yield batches; the bad images of a batch that had nothing else are carried over to the next."""
    waiting: list[Bad] = []
    for batch in loaded:
        if isinstance(batch, list):
            waiting += batch
        else:
            # in front: they were met before
            batch.bad[:0], waiting = waiting, []
            watch.add(batch.values)
            yield batch
