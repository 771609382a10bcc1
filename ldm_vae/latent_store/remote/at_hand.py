"""Files of shards at hand: those of a folder where they lie, those of a URL by way of the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm_vae.core.paths import cache_dir
from ldm_vae.core.validation import parse_json
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import ROWS, STATISTICS, TENSORS, shard_file, shard_path
from ldm_vae.latent_store.format.manifest import ShardRecord
from ldm_vae.latent_store.format.rows import map_shard
from ldm_vae.latent_store.storage.places import Place, storage_at

if TYPE_CHECKING:
    from ldm_vae.latent_store.remote.store import CachedFiles

T = TypeVar("T")

HEAD = 1 << 16  # bytes of a shard with its header and, of up to 13 channels, its table of sums


def opened(place: Place, shard: ShardRecord, extension: str, read: Callable[[Path], T]) -> T:
    """A file of a shard, read by `read` from the path where it is at hand. Raises WorkError where it cannot be had."""
    if isinstance(place, Path):
        return read(shard_path(place, shard.name, extension))
    return _cached(place, cache_dir(), os.environ.get("LDM_VAE_STORE_CACHE")).opened(shard, extension, read)


def rows_of(
    place: Place,
    shard: ShardRecord,
    columns: Sequence[str] | None = None,
    rows: int | None = None,
    optional: Sequence[str] = (),
) -> pa.Table:
    """As `shards.read_rows`, of a shard at a place."""
    return opened(place, shard, ROWS, lambda path: shards.read_rows(path.with_suffix(""), columns, rows, optional))


def mapped_tensors(place: Place, identity: Identity, shard: ShardRecord) -> dict[str, npt.NDArray[Any]]:
    """As `rows.map_shard`, of a shard at a place."""
    return opened(place, shard, TENSORS, lambda path: map_shard(path, identity, shard))


def sums_of(place: Place, identity: Identity, shard: ShardRecord) -> npt.NDArray[Any] | None:
    """The table of sums of a shard at a place, None where it has none; of a URL the beginning of the file alone."""
    if isinstance(place, Path):
        return mapped_tensors(place, identity, shard).get(STATISTICS)
    storage, name, size = storage_at(place), shard_file(shard.name, TENSORS), shard.files[TENSORS].bytes
    content = storage.read_range(name, 0, min(HEAD, size))
    length = int.from_bytes(content[:8], "little")
    try:
        entry = parse_json(content[8 : 8 + length])[STATISTICS]
        first, stop = (8 + length + offset for offset in entry["data_offsets"])
        if not 8 + length <= first <= stop <= size:
            return None
        if stop > len(content):
            content += storage.read_range(name, len(content), stop)
        return np.frombuffer(content[first:stop], "<f8").reshape(entry["shape"])
    except (ValueError, KeyError, TypeError):
        return None  # a longer header than any of ours, or no sums in it


@lru_cache(maxsize=8)  # the limit of a cache is found by listing it, which is not repeated for each shard
def _cached(url: str, _folder: Path, _limit: str | None) -> CachedFiles:
    from ldm_vae.latent_store.remote.cache import open_cache  # fsspec, which folders have no need of
    from ldm_vae.latent_store.remote.store import CachedFiles

    return CachedFiles(url, open_cache())
