"""Sampler: the global stream of images, the same whatever the processes, workers and resumes.

Position p of the stream is image `permutation(seed, p // N)[p % N]` of epoch p // N. The global batch that starts at
position P covers P ... P + GB - 1 (GB = world_size * batch_size), rank r the contiguous slice r * B ... (r + 1) * B - 1
of it. The stream has no end: batches run over the borders of epochs, so nothing is dropped, padded or uneven between
ranks, and a dataset smaller than the world works. It is computed in the main process; workers get finished tasks.

Legend: N images in the source, B batch of one rank, GB of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ldm_vae.core import rng
from ldm_vae.data.quarantine import Bad
from ldm_vae.data.source import Record


@dataclass(frozen=True, slots=True)
class Task:
    """One image to prepare: its position in the stream of all images, its epoch, its index in the source; of a source
    that can only be read in order, also what was read."""

    position: int
    epoch: int
    index: int
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's part of a global batch, for a worker: tasks, the (height, width) of its crops if the batch has its own
    (aspect buckets; of clips with their frames before), and what was found bad on the way here."""

    tasks: list[Task]
    shape: tuple[int, ...] | None = None
    bad: tuple[Bad, ...] = ()


def permutation(seed: int, epoch: int, count: int, bucket: int = 0) -> np.ndarray[Any, Any]:
    """The order of an epoch, [count] unsigned integers, keyed by (seed, epoch), and by the bucket where there are some.

    Four bytes an image (eight above 2^32 images): 40 MB and 0.2 s for 10^7, 4 GB for 10^9. One epoch is held, two while
    a batch runs over the border; for more images than that a store has `latent_store.read.windows`.
    """
    order = np.arange(count, dtype=np.uint32 if count <= 2**32 else np.uint64)
    rng.generator(seed, "order", epoch, bucket).shuffle(order)
    return order


class Stream(Protocol):
    """An endless stream in which each epoch has every image once."""

    def task(self, position: int) -> Task:
        """The task of one position; positions ascend."""


class Order:
    """position => task, with the permutation of the current epoch at hand."""

    def __init__(self, seed: int, count: int, bucket: int = 0) -> None:
        self.seed = seed
        self.count = count
        self.bucket = bucket
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.uint32)

    def task(self, position: int) -> Task:
        """The task of one position."""
        epoch, place = divmod(position, self.count)
        # one permutation is held: positions ascend, so an epoch is drawn once
        if epoch != self._epoch:
            self._permutation = permutation(self.seed, epoch, self.count, self.bucket)
            self._epoch = epoch
        return Task(position, epoch, int(self._permutation[place]))


def batches(
    order: Stream, *, batch_size: int, rank: int = 0, world_size: int = 1, start_position: int = 0
) -> Iterator[Work]:
    """This rank's batches, for ever, from the global batch that starts at `start_position`."""
    start = start_position
    while True:
        first = start + rank * batch_size
        # computed anew from the position: a resume needs no state but the number of images seen
        yield Work([order.task(position) for position in range(first, first + batch_size)])
        start += world_size * batch_size
