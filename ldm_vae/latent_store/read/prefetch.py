"""Prefetching: the loader's order is known, so the shards of its next batches are fetched early.

A few threads of the process that hands out the batches fetch files: of a store at a URL into the cache that all readers
share, where a reader that needs a file still under way waits for it (`cache.py`); of a store in a folder, read by
windows, into the page cache. What is ahead is bounded in shards, batches and bytes, so that what was prefetched does
not evict what is needed before it.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ldm_vae.core.errors import WorkError

if TYPE_CHECKING:
    from ldm_vae.latent_store.format.manifest import ShardRecord
    from ldm_vae.latent_store.read.dataset import LatentDataset
    from ldm_vae.latent_store.read.mapped_files import Files
    from ldm_vae.latent_store.remote.store import RemoteFiles

Tasks = list[tuple[int, int]]
Jobs: TypeAlias = "queue.SimpleQueue[ShardRecord | None]"  # None: no more

THREADS = 4
SHARDS = 8  # that are asked for beyond the next batches
FEWEST_BATCHES, MOST_BATCHES = 2, 1024


def prefetch_shards(dataset: LatentDataset, batches: Iterable[Tasks], at_once: int | None = None) -> Iterator[Tasks]:
    """Yield the same batches of (index, epoch), while the shards of later batches are fetched.

    Args:
        at_once: shards from which batches come at a time, if they come by windows; else a folder is left to itself.
    """
    remote = _remote(dataset)
    if remote is None and at_once is None:
        yield from batches
        return
    room = math.inf if remote is None else remote.cache.limit // 2
    # with all shards in sight there is nothing to ask for
    most = min((at_once or 0) + SHARDS, len(dataset.shards) - 1)
    columns = bool(dataset.batch_columns)
    coming: deque[tuple[Tasks, list[ShardRecord]]] = deque()
    window: Counter[str] = Counter()  # the shards of `coming`
    size = 0
    jobs: Jobs = queue.SimpleQueue()
    ended = threading.Event()
    for _ in range(THREADS):
        # daemons: a download that hangs does not keep the program from ending
        threading.Thread(target=_bring, args=(dataset.files, columns, jobs, ended), daemon=True).start()
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
                size > room or (len(coming) > FEWEST_BATCHES and (len(window) > most or len(coming) > MOST_BATCHES))
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


def _bring(files: Files, columns: bool, jobs: Jobs, ended: threading.Event) -> None:
    while (shard := jobs.get()) is not None and not ended.is_set():
        with contextlib.suppress(WorkError):  # one attempt: who needs it tries again, and says what is wrong
            files.bring(shard, columns, attempts=1)


def warn_if_small(dataset: LatentDataset, at_once: int | None = None) -> None:
    """Warn when the cache cannot hold what is read from in random order: the store, or a window and what is ahead."""
    files = _remote(dataset)
    if files is None:
        return
    sizes = sorted((shard.stored_bytes for shard in dataset.shards), reverse=True)
    if at_once is None and sum(sizes) > files.cache.limit:
        warnings.warn(
            f"store {files.url}: has {sum(sizes) / 1e9:,.1f} GB, its cache holds {files.cache.limit / 1e9:,.1f} GB: "
            "shuffled reading will download shards again and again; a `window` of shards, a larger cache_bytes, "
            "`shuffle=False` or `ldm-vae store pull` avoids it",
            stacklevel=3,
        )
    # twice: what was prefetched has half of the cache, since workers and other ranks are behind or ahead
    elif at_once is not None and (needed := 2 * sum(sizes[: at_once + SHARDS])) > files.cache.limit < sum(sizes):
        warnings.warn(
            f"store {files.url}: {at_once} shards at once and {SHARDS} ahead need a cache of {needed / 1e9:,.1f} GB, "
            f"it holds {files.cache.limit / 1e9:,.1f} GB: reading will wait for downloads; choose a smaller window or "
            "a larger cache_bytes",
            stacklevel=3,
        )


def _remote(dataset: LatentDataset) -> RemoteFiles | None:
    if isinstance(dataset.path, Path):
        return None
    from ldm_vae.latent_store.remote.store import RemoteFiles

    assert isinstance(dataset.files, RemoteFiles)
    return dataset.files
