"""Batches from a latent store: shuffled, one latent shape each, sharded over ranks, resumable to the batch.

    loader = LatentDataset("latents").loader(64, num_workers=4, rank=rank, world_size=world_size)
    for epoch in range(10):
        for batch in loader:                      # batch["latents"] [B, c, h, w], batch["caption"], ...
            ...
            checkpoint["loader"] = loader.state_dict()

The order is that of `ldm_vae.data.sampler`: an endless stream of global batches, in which each epoch is a permutation
keyed by (seed, epoch). Batches run over the border of epochs, so every sample comes exactly once per epoch and nothing
is dropped, padded or uneven between ranks; with several latent shapes each has such a stream, and the batches of all
are shuffled among each other. One pass over the loader gives the batches that begin in one epoch.

Legend: B batch of one rank, c latent channels, h w latent positions, N samples, GB = B * world_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ldm_vae.core.errors import UsageError
from ldm_vae.data import buckets, sampler
from ldm_vae.data.workers import load
from ldm_vae.latent_store.read.batch import Item
from ldm_vae.latent_store.read.prefetch import prefetch_shards, warn_if_small

if TYPE_CHECKING:
    from ldm_vae.latent_store.read.dataset import LatentDataset


class Schedule:
    """Schedule of one rank's batches: lists of (index, epoch), from any global batch on."""

    def __init__(
        self, dataset: LatentDataset, batch_size: int, seed: int, shuffle: bool, rank: int, world_size: int
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if len(dataset) == 0:
            raise UsageError(f"store {dataset.path}: no samples to load")
        self.seed, self.shuffle = seed, shuffle
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._members = list(dataset.shapes().values())
        self._dataset = dataset

    def before(self, epoch: int) -> int:
        """Number of global batches that begin before this epoch."""
        whole = self.batch_size * self.world_size
        # in order, each latent shape may end an epoch with a short batch
        if not self.shuffle:
            return epoch * sum(-(-len(indices) // whole) for indices in self._members)
        # shuffled, a batch belongs to the epoch in which it begins: ceil(epoch * N / GB) have begun before
        return sum(-(-epoch * len(indices) // whole) for indices in self._members)

    def batches(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches from global batch `step` on, for ever; not shuffled, the last of an epoch are short."""
        if not self.shuffle:
            yield from self._in_order(step)
        start = step * self.batch_size * self.world_size
        own = {"batch_size": self.batch_size, "rank": self.rank, "world_size": self.world_size, "start_position": start}
        if len(self._members) == 1:
            order = sampler.Order(self.seed, len(self._dataset))
            works: Iterable[sampler.Work] = sampler.batches(order, **own)
        else:
            # latent shapes are dealt as aspect buckets are: one shape a batch, batches of all shapes among each other
            bucket = np.empty(len(self._dataset), dtype=np.int16)
            for number, indices in enumerate(self._members):
                bucket[indices] = number
            # a bucket's shape is only its name here
            works = buckets.batches(buckets.Assignment(((0, 0),) * len(self._members), bucket), self.seed, **own)
        for work in works:
            yield [(task.index, task.epoch) for task in work.tasks]

    def _in_order(self, step: int) -> Iterator[list[tuple[int, int]]]:
        whole, each = self.batch_size * self.world_size, self.before(1)
        for number in itertools.count(step):
            epoch, place = divmod(number, each)
            for indices in self._members:
                count = -(-len(indices) // whole)
                if place < count:
                    part = indices[place * whole : (place + 1) * whole]
                    own = part[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                    yield [(int(index), epoch) for index in own]
                    break
                place -= count


class LatentLoader:
    """An iterable of batches: dicts of `latents` [B, c, h, w] (of a raw dataset its tensors), `index` [B] and columns
    (numbers as tensors, everything else as lists). Each pass over it is the next epoch.

    Args:
        batch_size: of this rank.
        shuffle: False gives the store's order, with short (on some ranks even empty) batches at the end, none twice.
        seed: of the order.
        num_workers: reading processes; a change of their number changes nothing.
        rank, world_size: whose part of each global batch.
        pin_memory: for a GPU.

    Raises:
        UsageError: a wrong number.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
    ) -> None:
        self.dataset = dataset
        self.schedule = Schedule(dataset, batch_size, seed, shuffle, rank, world_size)
        self.num_workers, self.pin_memory, self.prefetch_factor = num_workers, pin_memory, prefetch_factor
        self._step = 0
        if shuffle:
            warn_if_small(dataset)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        epoch = 0
        while self.schedule.before(epoch + 1) <= self._step:
            epoch += 1
        return epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self._step = self.schedule.before(epoch)

    def __len__(self) -> int:
        """Batches that are left of the current epoch."""
        return self.schedule.before(self.epoch + 1) - self._step

    def __iter__(self) -> Iterator[Item]:
        stop = self.schedule.before(self.epoch + 1)
        tasks = itertools.islice(self.schedule.batches(self._step), stop - self._step)
        reader = _Reader(self.dataset)
        for batch in load(
            reader, prefetch_shards(self.dataset, tasks), self.num_workers, self.pin_memory, self.prefetch_factor, None
        ):
            self._step += 1  # before it is given: a state that is saved after its step does not repeat it
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position behind the last batch that was given, and what the order depends on."""
        schedule = self.schedule
        return {
            "step": self._step,
            "global_batch": schedule.batch_size * schedule.world_size,
            "samples": len(self.dataset),
            "seed": schedule.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly there; the number of workers and ranks may differ, the global batch may not.

        Raises:
            UsageError: the state is of another store, seed or global batch.
        """
        for name, mine in self.state_dict().items():
            if name != "step" and state[name] != mine:
                raise UsageError(f"loader state: {name} was {state[name]}, is {mine}: the order would be another one")
        self._step = state["step"]


class LatentStream(IterableDataset[Item]):
    """The same batches as an iterable dataset, endless, for a DataLoader of one's own with `batch_size=None`: worker w
    of W makes batches w, w + W, ..., and the DataLoader puts them back in order."""

    def __init__(self, dataset: LatentDataset, batch_size: int, **options: Any) -> None:
        self._loader = LatentLoader(dataset, batch_size, **options)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start behind the batch at which a LatentLoader's state was taken."""
        self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader = _Reader(self._loader.dataset)
        batches = self._loader.schedule.batches(self._loader.state_dict()["step"])
        # dealt by number: worker w of W makes w, w + W, ..., whatever the others do
        for tasks in prefetch_shards(self._loader.dataset, itertools.islice(batches, first, None, every)):
            yield reader.__getitems__(tasks)


class _Reader:
    """Tasks => a batch, in a worker."""

    def __init__(self, dataset: LatentDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, tasks: Sequence[tuple[int, int]]) -> Item:
        # in order, a rank may have no part of an epoch's last batch
        if not tasks:
            return {}
        columns = self._dataset.batch_columns
        batch = self._dataset.read([index for index, _ in tasks], [epoch for _, epoch in tasks], columns)
        return {name: _collated(value) if name in columns else value for name, value in batch.items()}


def _collated(values: list[Any]) -> Any:
    """Numbers, and lists of equally many numbers, as a tensor; anything else as it is."""
    try:
        array = np.asarray(values)
    except ValueError:
        return values
    return torch.from_numpy(array) if array.dtype.kind in "iufb" else values
