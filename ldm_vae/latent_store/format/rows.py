"""Rows of a shard as they are stored, for code that needs all of them: statistics and comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.codes import CodeStatistics
from ldm_vae.latent_store.format.layout import (
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    shard_path,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import Identity, ShardRecord
from ldm_vae.latent_store.format.shards import CHUNK_ROWS
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
        usage = CodeStatistics(identity.codes)
        # CHUNK_ROWS at a time, so that no whole shard is held
        for view in identity.views:
            for first in range(0, len(keys), CHUNK_ROWS):
                usage.update(read(tensor_name("indices", view), first, min(first + CHUNK_ROWS, len(keys))))
        return usage.sums
    images = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
    dtype = SAFETENSORS_DTYPES[identity.dtype]
    total = LatentStatistics()
    for view in identity.views:
        for first in range(0, len(images), CHUNK_ROWS):
            stop = min(first + CHUNK_ROWS, len(images))
            variance = None
            if identity.store == "moments":
                logvar = shards.to_float(read(tensor_name("logvar", view), first, stop), dtype)
                variance = np.exp(logvar.astype(np.float64))
            values = shards.to_float(read(tensor_name(TENSOR_NAMES[identity.store][0], view), first, stop), dtype)
            total.update_values(values, variance, images[first:stop])
    assert total.sums is not None
    return total.sums


def accumulator(identity: Identity) -> LatentStatistics | CodeStatistics:
    """Empty accumulator for the tables of sums of a store's shards."""
    return LatentStatistics() if identity.codes is None else CodeStatistics(identity.codes)


def live_statistics(
    store: Path, identity: Identity, shard: ShardRecord, mapped: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    """The table of sums over the rows that are still there."""
    live = shard.live_rows
    keys = shards.read_rows(shard_path(store, shard.name), ["key"], shard.rows).column("key").take(live).to_pylist()
    return statistics(identity, lambda name, first, stop: mapped[name][live[first:stop]], keys)
