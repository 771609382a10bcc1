"""Rows of a shard as they are stored, for code that needs all of them: statistics and comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.chunks import CHUNK_ROWS, chunk_rows
from ldm_vae.latent_store.format.codes import CodeStatistics
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    PIXELS,
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    crops_of,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import ShardRecord
from ldm_vae.latent_store.format.statistics import LatentStatistics

ReadRows = Callable[[str, int, int], npt.NDArray[Any]]


def statistics(identity: Identity, read: ReadRows, keys: Sequence[str]) -> npt.NDArray[np.float64]:
    """The table of sums over rows as they are stored, all views; an image is identified by its key in each of them.
    Of indices, how often each code is used.

    Args:
        read: (tensor, first, stop) => rows [first, stop) of it.
        keys: of all rows.
    """
    if identity.codes is not None:
        usage = CodeStatistics(identity.codes, identity.codebooks)
        # CHUNK_ROWS at a time, so that no whole shard is held
        for view in identity.views:
            for first in range(0, len(keys), CHUNK_ROWS):
                usage.update(read(tensor_name("indices", view), first, min(first + CHUNK_ROWS, len(keys))))
        return usage.sums
    images = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
    dtype = SAFETENSORS_DTYPES[identity.dtype]
    total = LatentStatistics(patch=identity.patch)
    first_name = tensor_name(TENSOR_NAMES[identity.store][0], "")
    # chunks are a matter of the shape alone, since the last bits of sums depend on them
    step = chunk_rows(read(first_name, 0, 1).shape[1:])
    for view in identity.views:
        for first in range(0, len(images), step):
            stop = min(first + step, len(images))
            variance = None
            if identity.store == "moments":
                logvar = shards.to_float(read(tensor_name("logvar", view), first, stop), dtype)
                variance = np.exp(logvar.astype(np.float64))
            values = shards.to_float(read(tensor_name(TENSOR_NAMES[identity.store][0], view), first, stop), dtype)
            total.update_values(values, variance, images[first:stop])
    assert total.sums is not None
    return total.sums


def tensors_of(identity: Identity) -> list[str]:
    """Names of the tensors in a store's shards, in their order."""
    names = [tensor_name(name, view) for view in identity.views for name in TENSOR_NAMES[identity.store]]
    return names + ([tensor_name(PIXELS, crop) for crop in crops_of(identity.views)] if identity.pixels else [])


def map_shard(path: Path, identity: Identity, shard: ShardRecord) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a store's shard, mapped. Raises WorkError unless their types and shapes are the manifest's."""
    pixels, values = (-1, *shard.group[3:], *shard.size), SAFETENSORS_DTYPES[identity.dtype]
    specs = [
        shards.TensorSpec(name, "U8", pixels) if name.split(".")[0] == PIXELS
        else shards.TensorSpec(name, values, shard.shape)
        for name in tensors_of(identity)
    ]  # fmt: skip
    return shards.map_tensors(path, shard.rows, specs)


def are_sums(table: npt.NDArray[Any] | None, identity: Identity, shard: ShardRecord) -> bool:
    """True if a shard's table of sums is one of such a shard: other programs leave it out, or write anything."""
    width = 2 + 3 * shard.shape[0] * identity.patch**2 if identity.codes is None else 1 + identity.codes
    if identity.codebooks is not None and table is not None and len(table) != identity.codebooks:
        return False
    if table is None or table.dtype != np.float64 or table.ndim != 2 or table.shape[1] != width or not len(table):
        return False
    return bool(np.isfinite(table).all()) and table[0, 0] == shard.rows * len(identity.views)


def accumulator(identity: Identity) -> LatentStatistics | CodeStatistics:
    """Empty accumulator for the tables of sums of a store's shards."""
    if identity.codes is None:
        return LatentStatistics(patch=identity.patch)
    return CodeStatistics(identity.codes, identity.codebooks)


def live_statistics(
    identity: Identity, shard: ShardRecord, mapped: Mapping[str, npt.NDArray[Any]], keys: Sequence[str]
) -> npt.NDArray[np.float64]:
    """The table of sums over the rows that are still there, which have these keys."""
    live = shard.live_rows
    return statistics(identity, lambda name, first, stop: mapped[name][live[first:stop]], keys)
