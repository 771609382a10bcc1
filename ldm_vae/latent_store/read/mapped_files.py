"""Memory-mapped files of shards: mapped on first access, once per process; their pages are shared between processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ldm_vae.core.errors import WorkError
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    MAPPED_ROWS,
    PIXELS,
    ROWS,
    TENSORS,
    crop_of,
    is_flipped,
    shard_path,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import Manifest, ShardRecord
from ldm_vae.latent_store.format.rows import map_shard

MOST_MAPS = 30_000  # the kernel allows a process 65,530 mappings; stores of more shards give up the oldest ones
LOOK_EVERY = 5.0  # seconds between looks for maps whose file has left the cache


class Files(Protocol):
    """Files of a store's shards: in a local folder, or at a URL through a cache (`remote.RemoteFiles`)."""

    def tensors(self, shard: ShardRecord) -> dict[str, npt.NDArray[Any]]:
        """Its tensors, mapped. Raises WorkError."""

    def rows(self, shard: ShardRecord) -> pa.Table:
        """Its table, mapped. Raises WorkError."""

    def has_left(self, shard: ShardRecord) -> bool:
        """True when its file is gone, so that a map only holds its disk space."""

    def bring(self, shard: ShardRecord, columns: bool, *, attempts: int) -> None:
        """Fetch what of it is not at hand, without opening it. Raises WorkError."""


@dataclass(frozen=True)
class LocalFiles:
    """The shards of a store in a folder."""

    store: Path
    identity: Identity

    def tensors(self, shard: ShardRecord) -> dict[str, npt.NDArray[Any]]:
        """Its tensors, mapped."""
        return map_shard(self._inside(shard, TENSORS), self.identity, shard)

    def rows(self, shard: ShardRecord) -> pa.Table:
        """Its table: mapped from .arrow, or read from .parquet where that is missing."""
        self._inside(shard, ROWS)
        return shards.map_rows(self._inside(shard, MAPPED_ROWS).with_suffix(""), shard.rows)

    def has_left(self, shard: ShardRecord) -> bool:
        """Always False: nothing is evicted from the user's folder."""
        return False

    def bring(self, shard: ShardRecord, columns: bool, *, attempts: int) -> None:
        """Have the kernel read its files into the page cache, in order: a slow disk's random rows cost seeks."""
        for extension in (TENSORS, MAPPED_ROWS) if columns else (TENSORS,):
            path = self._inside(shard, extension)
            if hasattr(os, "posix_fadvise") and path.exists():  # not on macOS; rows may be in .parquet alone
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _inside(self, shard: ShardRecord, extension: str) -> Path:
        """The path of a shard's file. Raises WorkError for a link that leads out of the store."""
        path = shard_path(self.store, shard.name, extension)
        if path.is_symlink() and not path.resolve().is_relative_to(self.store.resolve()):
            raise WorkError(f"shard {path}: is a link that leads out of the store")
        return path


def open_files(place: str | Path, manifest: Manifest, cache_bytes: float | None = None) -> Files:
    """The shards of a store in a folder, or at a URL."""
    if isinstance(place, Path):
        return LocalFiles(place, manifest.identity)
    from ldm_vae.latent_store.remote.store import open_remote  # fsspec, which readers of folders have no need of

    return open_remote(place, manifest, cache_bytes)


class Maps:
    """Memory maps of a store's shards in this process.

    Args:
        records: the shards, which are then named by their place in this list.
    """

    def __init__(self, files: Files, records: Sequence[ShardRecord]) -> None:
        self.files, self._records = files, records
        self._tensors: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._columns: dict[int, dict[str, Any]] = {}
        self._next_look = 0.0

    def __len__(self) -> int:
        return len(self._tensors)

    def tensors(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """All tensors of a shard. Raises WorkError for one that is not as the manifest says."""
        mapped = self._tensors.get(shard)
        if mapped is None:
            mapped = self.files.tensors(self._records[shard])
            self._give_up_what_left()
            _make_room(self._tensors)
            self._tensors[shard] = mapped
        return mapped

    def _give_up_what_left(self) -> None:
        """A map keeps the disk space of a file that was evicted: another look every few seconds."""
        if time.monotonic() >= self._next_look:
            for number in [number for number in self._tensors if self.files.has_left(self._records[number])]:
                del self._tensors[number]
            self._next_look = time.monotonic() + LOOK_EVERY

    def columns(self, shard: int) -> dict[str, Any]:
        """The columns of a shard, each as one Arrow array. Raises WorkError."""
        columns = self._columns.get(shard)
        if columns is None:
            table = self.files.rows(self._records[shard]).combine_chunks()
            columns = {name: table.column(name).chunk(0) for name in table.column_names}
            _make_room(self._columns)
            self._columns[shard] = columns
        return columns

    def gather(
        self, name: str, views: list[str] | str, shard: list[int], row: list[int], shape: Sequence[int], dtype: str
    ) -> torch.Tensor:
        """Stored rows => [B, c, h, w] in storage dtype, copied once; views: of each row, or of all."""
        out = np.empty((len(shard), *shape), dtype=shards.STORAGE[dtype])
        if isinstance(views, str):
            one = tensor_name(name, views)
            # each shard's map is looked up once a batch, not once a row
            arrays = {s: self.tensors(s)[one] for s in set(shard)}
            for position, (s, r) in enumerate(zip(shard, row, strict=True)):
                out[position] = arrays[s][r]
        else:
            for position, (s, r, view) in enumerate(zip(shard, row, views, strict=True)):
                out[position] = self.tensors(s)[tensor_name(name, view)][r]
        return torch.from_numpy(out) if dtype != "BF16" else torch.from_numpy(out).view(torch.bfloat16)

    def pixels(self, views: list[str] | str, shard: list[int], row: list[int]) -> torch.Tensor:
        """Stored crops => uint8 [B, C, H, W], mirrored where the view is."""
        each = [views] * len(shard) if isinstance(views, str) else views
        crops = []
        for s, r, view in zip(shard, row, each, strict=True):
            crop = self.tensors(s)[tensor_name(PIXELS, crop_of(view))][r]
            crops.append(crop[..., ::-1] if is_flipped(view) else crop)
        return torch.from_numpy(np.stack(crops))

    def value(self, shard: int, row: int, name: str) -> Any:
        """One value of a column; None where the shard has no such column."""
        column = self.columns(shard).get(name)
        return None if column is None else column[row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the files themselves: maps are not sent, their pages are shared anyway."""
        return {**self.__dict__, "_tensors": {}, "_columns": {}}


def _make_room(maps: dict[int, Any]) -> None:
    """Give up the oldest mapping when there are too many."""
    if len(maps) >= MOST_MAPS:
        del maps[next(iter(maps))]
