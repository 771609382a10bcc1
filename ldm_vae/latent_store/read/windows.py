"""Windows: an order of an epoch that needs few shards at a time, for stores that no disk holds.

The shards of an epoch are permuted, and so are the rows of each. Shard j of that order gives its rows in W equal parts
to the segments j ... j + W - 1, and the rows of a segment are permuted. So W shards are in the window at any time, one
comes and one leaves with each segment, and every shard is in it once an epoch. The segments at either end, which fewer
shards would reach, are joined to one: it holds rows of W shards as well, and a window of all shards is the permutation
of all rows. All draws are keyed by (seed, epoch), so any position is found without those before it.

With several lanes the order is cut in equal stretches, each of which gives its share of every global batch: where lanes
are machines, each reads its own shards, and W more for each border. The order depends on the window, the lanes and the
global batch, not on the number of ranks. `python -m eval.shuffle` compares it with a uniform one.

Legend: S shards, N rows, W window, L lanes, GB global batch.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.core import rng
from ldm_vae.data.sampler import Task

Integers = npt.NDArray[np.int64]


class WindowedOrder:
    """position => task, as `sampler.Order`: an endless stream in which each epoch has every row once.

    Args:
        rows: of each shard, [S].
        window: shards, W; a larger one than S is S.
        lanes: divides `whole`.
        whole: the global batch, GB.
        bucket: of one latent shape, where there are several.
    """

    def __init__(self, seed: int, rows: Integers, window: int, lanes: int, whole: int, bucket: int = 0) -> None:
        self.seed, self.rows, self.bucket = seed, rows, bucket
        self.window, self.lanes, self.whole = min(window, len(rows)), lanes, whole
        self.count = int(rows.sum())
        self._first = np.cumsum(rows) - rows
        self._epoch = -1

    def task(self, position: int) -> Task:
        """The task of one position."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._begin(epoch)
        lane, place = (0, place) if self.lanes == 1 else self._in_lane(place)
        first, rows = self._at[lane]
        # a segment of each lane is at hand: places ascend within a lane
        if not first <= place < first + len(rows):
            segment = bisect_right(self._starts, place) - 1
            first, rows = self._at[lane] = self._starts[segment], self._segment(segment, lane)
        return Task(position, epoch, int(rows[place - first]))

    def _begin(self, epoch: int) -> None:
        """Order the shards of an epoch, and find where its segments begin."""
        self._epoch, window = epoch, self.window
        self._order = np.arange(len(self.rows))
        rng.generator(self.seed, "shards", epoch, self.bucket).shuffle(self._order)
        held = self.rows[self._order]
        self._segments = len(held) - window + 1
        sizes = np.zeros(self._segments, dtype=np.int64)
        place = np.arange(len(held))
        for part in range(window):
            size = held * (part + 1) // window - held * part // window
            np.add.at(sizes, np.clip(place + part - window + 1, 0, self._segments - 1), size)
        self._starts: list[int] = (np.cumsum(sizes) - sizes).tolist()
        self._at: list[tuple[int, npt.NDArray[Any]]] = [(0, sizes[:0])] * self.lanes
        self._permuted: list[dict[int, npt.NDArray[Any]]] = [{} for _ in range(self.lanes)]
        # An epoch need not begin with a global batch. So that lanes stay the same parts of every batch, the rows of
        # the one that is under way, and of the last, which is not full, are shared among them beside the others.
        self._head = min(-epoch * self.count % self.whole, self.count)
        self._batches, self._tail = divmod(self.count - self._head, self.whole)

    def _segment(self, segment: int, lane: int) -> npt.NDArray[Any]:
        """The rows of a segment, in their order."""
        window, last = self.window, self._segments - 1
        # the permuted rows of the shards in a lane's window: those that have left it are given up
        permuted = {place: rows for place, rows in self._permuted[lane].items() if place >= segment}
        parts = []
        for place in range(segment, segment + window):
            shard = int(self._order[place])
            if place not in permuted:
                permuted[place] = np.arange(self.rows[shard], dtype=np.uint32)
                rng.generator(self.seed, "rows", self._epoch, self.bucket, shard).shuffle(permuted[place])
            rows, part = permuted[place], segment + window - 1 - place
            begin = 0 if segment == 0 else len(rows) * part // window
            end = len(rows) if segment == last else len(rows) * (part + 1) // window
            parts.append(rows[begin:end] + self._first[shard])
        self._permuted[lane] = permuted
        order = np.concatenate(parts)
        rng.generator(self.seed, "segments", self._epoch, self.bucket, segment).shuffle(order)
        return order

    def _in_lane(self, place: int) -> tuple[int, int]:
        """The lane of a place in the epoch, and the place in the order that the lanes are stretches of."""
        lanes, head, tail, each = self.lanes, self._head, self._tail, self.whole // self.lanes
        full = self._batches * self.whole
        if place < head:
            lane = _owner(place, head, lanes)
            within = place - _share(head, lane, lanes)
        elif place < head + full:
            batch, offset = divmod(place - head, self.whole)
            lane = offset // each
            within = self._head_of(lane) + batch * each + offset % each
        else:
            left = place - head - full
            lane = _owner(left, tail, lanes)
            within = self._head_of(lane) + self._batches * each + left - _share(tail, lane, lanes)
        return lane, _share(head, lane, lanes) + lane * self._batches * each + _share(tail, lane, lanes) + within

    def _head_of(self, lane: int) -> int:
        return _share(self._head, lane + 1, self.lanes) - _share(self._head, lane, self.lanes)


def _share(total: int, lane: int, lanes: int) -> int:
    """Of so many rows those of the lanes before this one."""
    return total * lane // lanes


def _owner(place: int, total: int, lanes: int) -> int:
    """The lane whose share has this place: the first one before whose end it is."""
    return -(-lanes * (place + 1) // total) - 1


def rows_of_shards(live: Sequence[int], members: Sequence[int] | Integers) -> Integers:
    """Rows of the shards that hold `members`, which are whole shards in their order, as `LatentDataset.shapes` has
    them; without shards that have no rows."""
    rows = np.asarray(live, dtype=np.int64)
    own = rows > 0
    if not isinstance(members, range):
        own &= np.isin(np.cumsum(rows) - rows, members)
    return rows[own]


def fingerprint(rows: Integers) -> int:
    """Number that names a layout of shards: a merge of the same samples into other ones gives another order."""
    return zlib.crc32(rows.astype("<i8").tobytes())
