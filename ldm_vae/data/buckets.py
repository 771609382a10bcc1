"""Aspect-ratio buckets: images of any shape in batches of one shape, as SDXL's trainers know them.

    shapes = generate(area=1024 * 1024, step=64)                  # 1024 x 1024, 960 x 1088, 896 x 1152, ...
    sizes, unreadable = read_sizes(source, range(len(source)))    # ldm_vae/data/sizes.py
    assignment = assign(shapes, sizes)
    loader = training_loader(source, transform, 1024, buckets=assignment, ...)

Each bucket has its own endless stream, shuffled epoch by epoch, cut into global batches; the batches of all buckets are
shuffled among each other. A batch that an epoch does not fill is filled by the next epoch of its bucket: every image
comes once per epoch of its bucket, every rank gets the same number of batches, and nothing is padded or dropped.

Of clips a shape is (frames, height, width), and a size too: the frames of the longest clip that a video has, 1 of an
image. A video goes to the longest bucket that it fills, images to those of one frame.

Legend: N images, K buckets, B batch of one rank, GB of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ldm_vae.core import rng
from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.sampler import Order, Stream, Task, Work

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Sides = tuple[int, int]


class BucketConfig(Section):
    """`buckets: {step: 64}` makes them from the area; `buckets: {shapes: [[1024, 1024], [832, 1216]]}` names them."""

    shapes: tuple[tuple[int, int] | tuple[int, int, int], ...] | None = None
    """The list itself, (height, width) each, of clips also (frames, height, width); area, step and max_aspect then have
    nothing to say."""
    area: int | None = Field(None, gt=0)
    """Pixels of a bucket, at most; resolution * resolution if it is not given."""
    step: int = Field(64, gt=0)
    """Sides are multiples of it, and of f."""
    max_aspect: float = Field(2.0, ge=1.0)
    """No bucket is longer than so many times its short side."""

    @model_validator(mode="after")
    def _check(self) -> BucketConfig:
        if self.shapes is not None:
            if not self.shapes or min(min(shape) for shape in self.shapes) < 1:
                raise ValueError("shapes: expected at least one (height, width), each above 0")
            if len({len(shape) for shape in self.shapes}) > 1:
                raise ValueError("shapes: expected all of them as (height, width), or all as (frames, height, width)")
            made = [name for name in ("area", "step", "max_aspect") if name in self.model_fields_set]
            changed = [name for name in made if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(f"{changed[0]}: has no effect beside shapes")
        return self

    def choose(self, resolution: int, factor: int) -> list[Shape]:
        """The shapes of a run, (height, width), or as they are named.

        Args:
            resolution: gives the area where none is given.
            factor: f of the autoencoder.

        Raises:
            UsageError: a side is not a multiple of f, or no shape fits.
        """
        if self.shapes is None:
            shapes: list[Shape] = [*generate(self.area or resolution**2, self.step, self.max_aspect)]
        else:
            shapes = sorted(set(self.shapes), key=lambda shape: (shape[-2] / shape[-1], *shape[:-2]))
        for shape in shapes:
            if shape[-2] % factor or shape[-1] % factor:
                raise UsageError(f"buckets: sides must be multiples of f = {factor}, got {shape[-2]} x {shape[-1]}")
        return shapes


def of_clips(shapes: Sequence[Shape], frames: int) -> list[Shape]:
    """Shapes (height, width) => those of clips of so many frames and of images; others as they are."""
    return [
        longer for shape in shapes
        for longer in ([(1, *shape), (frames, *shape)][frames == 1 :] if len(shape) == 2 else [shape])
    ]  # fmt: skip


def generate(area: int, step: int = 64, max_aspect: float = 2.0) -> list[Sides]:
    """Bucket shapes (height, width), sorted by height / width: sides are multiples of `step`, the area is as large as
    fits into `area`, and no side is longer than `max_aspect` times the other.

    Raises:
        UsageError: no shape fits.
    """
    if area < step * step or step < 1 or max_aspect < 1:
        raise UsageError(
            f"buckets: expected area >= step * step and max_aspect >= 1, got area {area}, step {step}, {max_aspect:g}"
        )
    shapes: set[Sides] = set()
    # the short side only: each shape is added with its transpose
    for height in range(step, math.isqrt(area) + 1, step):
        width = area // height // step * step
        if width <= max_aspect * height:
            shapes |= {(height, width), (width, height)}
    if not shapes:
        raise UsageError(f"buckets: no shape of area {area} in steps of {step} within aspect {max_aspect:g}")
    return sorted(shapes, key=lambda shape: shape[0] / shape[1])


@dataclass(frozen=True)
class Assignment:
    """Bucket of every image: shapes (K of them), bucket int16 [N], -1 for an unreadable image."""

    shapes: tuple[Shape, ...]
    bucket: Array

    def counts(self) -> list[int]:
        """Images per bucket [K]."""
        return [int((self.bucket == number).sum()) for number in range(len(self.shapes))]

    def lines(self) -> list[str]:
        """Lines of text: the shapes that have images, and how many."""
        counted = zip(self.shapes, self.counts(), strict=True)
        return [f"  {' x '.join(map(str, shape)):14}{count:>8,}" for shape, count in counted if count]


def assign(shapes: Sequence[Shape], sizes: Array) -> Assignment:
    """The bucket whose aspect ratio is nearest, in the logarithm, so that 2:1 and 1:2 are treated alike; of clips among
    the longest that it fills.

    Args:
        sizes: (H, W) of each image, or (frames, H, W), int [N, 2] or [N, 3], as the shapes are.
    """
    if not shapes:
        raise UsageError("buckets: the list of shapes is empty")
    aspects = np.log([shape[-2] / shape[-1] for shape in shapes])
    readable = (sizes > 0).all(axis=1)
    # unreadable sizes are 0, which has no logarithm; `readable` masks them
    safe = np.maximum(sizes, 1)
    own = np.log(safe[:, -2] / safe[:, -1])
    frames = longest_of(shapes, sizes)
    bucket = np.full(len(sizes), -1, dtype=np.int16)
    best = np.full(len(sizes), np.inf)
    for number, aspect in enumerate(aspects):  # K passes over [N] rather than one [N, K]
        distance = np.abs(own - aspect)
        nearer = readable & (distance < best) & (frames == (shapes[number][0] if len(shapes[number]) == 3 else 0))
        bucket[nearer], best[nearer] = number, distance[nearer]
    return Assignment(tuple(shapes), bucket)


def longest_of(shapes: Sequence[Shape], sizes: Array) -> Array:
    """Frames of the bucket of each video, int [N]: the most that it fills; an image's are 1, and no video's while there
    are longer ones. -1 where it fills none; 0 for all where shapes have none."""
    lengths = sorted({shape[0] for shape in shapes if len(shape) == 3})
    if not lengths:
        return np.zeros(len(sizes), np.int64)
    found = np.full(len(sizes), -1, np.int64)
    for length in lengths:
        fills = (sizes[:, 0] == 1) if length == 1 < lengths[-1] else (sizes[:, 0] >= length)
        found[fills] = length
    return found


def batches(
    assignment: Assignment,
    seed: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    stream: Callable[[int, int], Stream] | None = None,
) -> Iterator[Work]:
    """This rank's batches, for ever. The plan depends on the global batch, so a resume with another one starts at the
    first whole batch behind `start_position`.

    Args:
        stream: of (the number of a bucket, how many images it has) the order of its images; shuffled by default.

    Raises:
        WorkError: not one image has a bucket.
    """
    members = [np.flatnonzero(assignment.bucket == number) for number in range(len(assignment.shapes))]
    if not any(len(indices) for indices in members):
        raise WorkError("no usable image: not one has a readable size")
    # one endless stream for each bucket, keyed by its number
    stream = stream or (lambda number, count: Order(seed, count, bucket=number))
    orders = [stream(number, len(indices)) for number, indices in enumerate(members)]
    whole = batch_size * world_size
    # rounded up: batches before it were seen in whole or in part
    step = -(-start_position // whole)
    for number, place in _plan([len(indices) for indices in members], seed, whole, step):
        first = place * whole + rank * batch_size
        # positions count over all buckets, as in a run without them: noise is keyed by them
        at = step * whole + rank * batch_size
        own = [orders[number].task(first + offset) for offset in range(batch_size)]
        tasks = [Task(at + offset, task.epoch, int(members[number][task.index])) for offset, task in enumerate(own)]
        yield Work(tasks, shape=assignment.shapes[number])
        step += 1


def _plan(counts: Sequence[int], seed: int, whole: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (bucket, number of batches of it before) from global batch `step` on. Epoch e of the plan holds the batches
    that start in epoch e of their bucket, in an order keyed by (seed, e)."""

    def before(epoch: int) -> int:
        return sum(-(-epoch * count // whole) for count in counts)

    epoch = 0
    while before(epoch + 1) <= step:
        epoch += 1
    while True:
        entries = [
            (number, place)
            for number, count in enumerate(counts)
            for place in range(-(-epoch * count // whole), -(-(epoch + 1) * count // whole))
        ]
        # the same on every rank, so a global batch has one shape everywhere
        rng.generator(seed, "buckets", epoch).shuffle(entries)
        yield from entries[step - before(epoch) :]
        epoch += 1
        step = before(epoch)
