"""Prefetching from a store at a URL: the loader's order is known, so the shards of its next batches are downloaded
early.

A few threads of the process that hands out the batches download files into the cache that all readers share; a reader
that needs a file still under way waits for it (`cache.py`). The window is bounded in shards, batches and bytes, so that
what was prefetched does not evict what is needed before it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_vae.core.errors import WorkError
from ldm_vae.latent_store.format.manifest import ShardRecord

if TYPE_CHECKING:
    from ldm_vae.latent_store.read.dataset import LatentDataset
    from ldm_vae.latent_store.remote.store import RemoteFiles

Tasks = list[tuple[int, int]]
Jobs = queue.SimpleQueue[ShardRecord | None]  # None: no more

THREADS = 4
SHARDS = 8  # that are asked for beyond the next batches
FEWEST_BATCHES, MOST_BATCHES = 2, 1024


def prefetch_shards(dataset: LatentDataset, batches: Iterable[Tasks]) -> Iterator[Tasks]:
    """Yield the same batches of (index, epoch); of a remote store, while the shards of later batches are downloaded."""
    files = _remote(dataset)
    if files is None:
        yield from batches
        return
    columns = bool(dataset.batch_columns)
    coming: deque[tuple[Tasks, list[ShardRecord]]] = deque()
    window: Counter[str] = Counter()  # the shards of `coming`
    size = 0
    jobs, ended = Jobs(), threading.Event()
    for _ in range(THREADS):
        # daemons: a download that hangs does not keep the program from ending
        threading.Thread(target=_bring, args=(files, columns, jobs, ended), daemon=True).start()
    try:
        for tasks in batches:
            shards = dataset.shards_of([index for index, _ in tasks])
            coming.append((tasks, shards))
            # a shard is asked for once, however many batches of the window need it
            for shard in shards:
                window[shard.name] += 1
                if window[shard.name] == 1:
                    size += shard.stored_bytes
                    jobs.put(shard)
            # The oldest batch is handed out when the window is full: in bytes (half of the cache, so that prefetched
            # files do not evict those being read), in shards or in batches; FEWEST_BATCHES stay in sight however many
            # shards they touch.
            while len(coming) > 1 and (
                size > files.cache.limit // 2
                or (len(coming) > FEWEST_BATCHES and (len(window) > SHARDS or len(coming) > MOST_BATCHES))
            ):
                tasks, shards = coming.popleft()
                yield tasks
                # after the yield: while the consumer reads the batch its shards still count
                for shard in shards:
                    window[shard.name] -= 1
                    if not window[shard.name]:
                        del window[shard.name]
                        size -= shard.stored_bytes
        for tasks, _ in coming:
            yield tasks
    finally:
        # also when the consumer stops early and this generator is closed
        ended.set()
        for _ in range(THREADS):
            jobs.put(None)


def _bring(files: RemoteFiles, columns: bool, jobs: Jobs, ended: threading.Event) -> None:
    while (shard := jobs.get()) is not None and not ended.is_set():
        with contextlib.suppress(WorkError):  # one attempt: who needs it tries again, and says what is wrong
            files.bring(shard, columns, attempts=1)


def warn_if_small(dataset: LatentDataset) -> None:
    """Warn when the cache cannot hold the store, which is about to be read in random order."""
    files = _remote(dataset)
    size = sum(shard.stored_bytes for shard in dataset.shards)
    if files is not None and size > files.cache.limit:
        warnings.warn(
            f"store {files.url}: has {size / 1e9:,.1f} GB, its cache holds {files.cache.limit / 1e9:,.1f} GB: shuffled "
            "reading will download shards again and again; a larger cache_bytes, `shuffle=False` or `ldm-vae store "
            "pull` avoids it",
            stacklevel=3,
        )


def _remote(dataset: LatentDataset) -> RemoteFiles | None:
    if isinstance(dataset.path, Path):
        return None
    from ldm_vae.latent_store.remote.store import RemoteFiles

    assert isinstance(dataset.files, RemoteFiles)
    return dataset.files
