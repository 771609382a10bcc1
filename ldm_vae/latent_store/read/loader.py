"""Batches from a latent store: shuffled, one latent shape each, sharded over ranks, resumable to the batch.

    loader = LatentDataset("latents").loader(64, num_workers=4, rank=rank, world_size=world_size)
    for epoch in range(10):
        for batch in loader:                      # batch["latents"] [B, c, h, w], batch["caption"], ...
            ...
            checkpoint["loader"] = loader.state_dict()

The order is that of `ldm_vae.data.sampler`: an endless stream of global batches, in which each epoch is a permutation
keyed by (seed, epoch). Batches run over the border of epochs, so every sample comes exactly once per epoch and nothing
is dropped, padded or uneven between ranks; with several latent shapes each has such a stream, and the batches of all
are shuffled among each other. One pass over the loader gives the batches that begin in one epoch. With a `window` the
permutation is one that needs few shards at a time (`windows.py`); all of the above holds.

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
from ldm_vae.latent_store.read.windows import WindowedOrder, fingerprint, rows_of_shards

if TYPE_CHECKING:
    from ldm_vae.latent_store.read.dataset import LatentDataset


class Schedule:
    """Schedule of one rank's batches: lists of (index, epoch), from any global batch on."""

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        window: int | None,
        lanes: int,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if len(dataset) == 0:
            raise UsageError(f"store {dataset.path}: no samples to load")
        if window is not None and (window < 1 or not shuffle):
            raise UsageError(f"window: expected at least 1 shard, and shuffle=True; got {window}, shuffle={shuffle}")
        whole = batch_size * world_size
        if lanes < 1 or whole % lanes or (lanes > 1 and window is None):
            raise UsageError(f"lanes: expected a divisor of the global batch of {whole}, with a window; got {lanes}")
        self.seed, self.shuffle = seed, shuffle
        self.window, self.lanes = window, lanes
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._members = list(dataset.shapes().values())
        self._dataset = dataset
        live = [shard.live for shard in dataset.shards]
        # of each latent shape, for windows
        self.rows_of_shards = [rows_of_shards(live, indices) for indices in self._members]

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
            works: Iterable[sampler.Work] = sampler.batches(self._order(0, len(self._dataset)), **own)
        else:
            # latent shapes are dealt as aspect buckets are: one shape a batch, batches of all shapes among each other
            bucket = np.empty(len(self._dataset), dtype=np.int16)
            for number, indices in enumerate(self._members):
                bucket[indices] = number
            # a bucket's shape is only its name here
            named = buckets.Assignment(((0, 0),) * len(self._members), bucket)
            works = buckets.batches(named, self.seed, **own, stream=self._order)
        for work in works:
            yield [(task.index, task.epoch) for task in work.tasks]

    def prefetched(self, batches: Iterable[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        """The same batches, while the shards of later ones are fetched."""
        return prefetch_shards(self._dataset, batches, self.shards_at_once)

    @property
    def shards_at_once(self) -> int | None:
        """Shards from which this rank's batches come at a time, at most; None: all of the store."""
        if self.window is None:
            return None
        # a lane has `each` places of a global batch; this rank's places may lie in several
        each, first = self.batch_size * self.world_size // self.lanes, self.rank * self.batch_size
        lanes = (first + self.batch_size - 1) // each - first // each + 1
        return sum(min(self.window, len(rows)) * lanes for rows in self.rows_of_shards)

    def windows(self) -> dict[str, int]:
        """Settings of a windowed order."""
        if self.window is None:
            return {}
        rows = np.concatenate(self.rows_of_shards)
        return {"window": self.window, "lanes": self.lanes, "shards": fingerprint(rows)}

    def _order(self, number: int, count: int) -> sampler.Stream:
        """The stream of one latent shape."""
        if self.window is None:
            return sampler.Order(self.seed, count, bucket=number)
        whole = self.batch_size * self.world_size
        return WindowedOrder(self.seed, self.rows_of_shards[number], self.window, self.lanes, whole, number)

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
        window: shards among which rows are shuffled, for a store that the disk does not hold; None is all. Those of a
            window and SHARDS more are asked for in time: into the cache of a store at a URL, into the page cache of
            one in a folder.
        lanes: with a window, parts of every global batch that read shards of their own: as many as machines. A resume
            on another number of machines keeps it.
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
        window: int | None = None,
        lanes: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
    ) -> None:
        self.dataset = dataset
        self.schedule = Schedule(dataset, batch_size, seed, shuffle, rank, world_size, window, lanes)
        self.num_workers, self.pin_memory, self.prefetch_factor = num_workers, pin_memory, prefetch_factor
        self._step = 0
        if shuffle:
            warn_if_small(dataset, self.schedule.shards_at_once)

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
        left, reader, batches = len(self), _Reader(self.dataset), self.schedule.batches(self._step)
        # shuffled, the shards that the next pass begins with are asked for as well; in order, there is often none
        ahead = batches if self.schedule.shuffle else itertools.islice(batches, left)
        tasks = itertools.islice(self.schedule.prefetched(ahead), left)
        for batch in load(reader, tasks, self.num_workers, self.pin_memory, self.prefetch_factor, None):
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
            **schedule.windows(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly there; the number of workers and ranks may differ, the global batch may not.

        Raises:
            UsageError: the state is of another store, seed or global batch.
        """
        mine = self.state_dict()
        for name in {**mine, **state}:
            if name != "step" and state.get(name) != mine.get(name):
                raise UsageError(
                    f"loader state: {name} was {state.get(name)}, is {mine.get(name)}: the order would be another one"
                )
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
        for tasks in self._loader.schedule.prefetched(itertools.islice(batches, first, None, every)):
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
