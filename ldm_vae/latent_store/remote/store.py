"""A store at a URL: its manifest as it is there now, its shards by way of the local cache.

    LatentDataset("s3://bucket/latents")
    LatentDataset("hf://datasets/USER/NAME")
    LatentDataset("https://example.org/latents", cache_bytes=200e9)

The manifest is read anew whenever the store is opened and is never kept; files are asked for by its checksums. So a
store that was replaced is read as it is now, and what both versions share is not fetched twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
import pyarrow as pa

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.fsspec_files import AbsentError
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    MAPPED_ROWS,
    ROWS,
    TENSORS,
    shard_file,
)
from ldm_vae.latent_store.format.manifest import Manifest, ShardRecord
from ldm_vae.latent_store.format.rows import map_shard
from ldm_vae.latent_store.remote.cache import Cache, open_cache

T = TypeVar("T")


def file_url(store: str, shard: ShardRecord, extension: str) -> str:
    """URL of one file of a shard."""
    return f"{store}/{shard_file(shard.name, extension)}"


@dataclass(frozen=True)
class CachedFiles:
    """The files of the store at `url`: one that is not in the cache is downloaded first."""

    url: str
    cache: Cache

    def opened(self, shard: ShardRecord, extension: str, opened: Callable[[Path], T]) -> T:
        """A file, opened by `opened` from its path in the cache. Raises WorkError."""
        while True:
            path = self._fetch(shard, extension)
            try:
                return opened(path)
            except WorkError:
                if self.cache.holds(shard.files[extension], extension):
                    raise  # otherwise another process has evicted it between the two lines

    def _fetch(self, shard: ShardRecord, extension: str, **options: int) -> Path:
        return self.cache.fetch(file_url(self.url, shard, extension), shard.files[extension], extension, **options)


@dataclass(frozen=True)
class RemoteFiles(CachedFiles):
    """The shards of the store at `url`, as `mapped_files.Files`."""

    identity: Identity

    def tensors(self, shard: ShardRecord) -> dict[str, npt.NDArray[Any]]:
        """Its tensors, mapped."""
        return self.opened(shard, TENSORS, lambda path: map_shard(path, self.identity, shard))

    def rows(self, shard: ShardRecord) -> pa.Table:
        """Its table: mapped from .arrow, or read from .parquet where that is missing."""
        try:
            return self.opened(shard, MAPPED_ROWS, lambda path: shards.map_rows(path.with_suffix(""), shard.rows))
        except AbsentError:
            return self.opened(shard, ROWS, lambda path: shards.map_rows(path.with_suffix(""), shard.rows))

    def has_left(self, shard: ShardRecord) -> bool:
        """True when its tensors were evicted from the cache since they were mapped."""
        return not self.cache.holds(shard.files[TENSORS], TENSORS)

    def bring(self, shard: ShardRecord, columns: bool, *, attempts: int) -> None:
        """Download what is missing of it, without opening it. Raises WorkError."""
        for extension in (TENSORS, MAPPED_ROWS) if columns else (TENSORS,):
            self._fetch(shard, extension, attempts=attempts)


def open_remote(url: str, manifest: Manifest, cache_bytes: float | None) -> RemoteFiles:
    """The shards of a store at a URL. Raises UsageError when the cache could not hold one of them."""
    files = RemoteFiles(url, open_cache(cache_bytes), manifest.identity)
    largest = max((file.bytes for shard in manifest.shards for file in shard.files.values()), default=0)
    if largest > files.cache.limit:
        raise UsageError(
            f"cache_bytes: {files.cache.limit:,} bytes cannot hold a file of {largest:,}, the largest of {url}"
        )
    return files
