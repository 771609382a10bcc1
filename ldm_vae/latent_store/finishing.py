"""Finishing: the unit records become the manifest and quarantine.jsonl. Doing it again gives the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm_vae.errors import WorkError
from ldm_vae.latent_store import publish, shards, units
from ldm_vae.latent_store.manifest import SHARDS, UNITS, Manifest, read_manifest, write_manifest
from ldm_vae.latent_store.shards import CHUNK_ROWS, STATISTICS, TENSORS, TensorSpec
from ldm_vae.latent_store.statistics import LatentStatistics
from ldm_vae.latent_store.units import UnitRecord

QUARANTINE = "quarantine.jsonl"
WARN_BAD = 0.01

ReadRows = Callable[[TensorSpec, int, int], npt.NDArray[Any]]


def finish(store: Path, *, max_bad: float = 1.0) -> Manifest:
    """Merge the records of all units into a complete manifest, and remove what killed processes left.

    Raises:
        WorkError: a unit has no record yet, nothing is usable, or more than `max_bad` of the images is bad.
    """
    manifest = read_manifest(store)
    size = manifest.identity.shard_size
    expected = range(-(-manifest.source.samples // size))
    records = [_record(store, unit) for unit in tqdm(expected, desc="merge", unit="units", disable=None, leave=False)]
    bad = [entry for record in records for entry in record.bad]
    entries = [shard for record in records for shard in record.shards]
    rows = sum(shard.live for shard in entries)
    _write_quarantine(store, records)
    if rows == 0:
        first = f", the first is {bad[0].key}: {bad[0].reason}" if bad else ""
        raise WorkError(f"no usable image among {manifest.source.samples:,}; see {store / QUARANTINE}{first}")
    if len(bad) > max_bad * manifest.source.samples:
        raise WorkError(
            f"{len(bad):,} of {manifest.source.samples:,} images are unusable, more than max_bad {max_bad:g} allows; "
            f"see {store / QUARANTINE}"
        )
    statistics = LatentStatistics()
    for shard in entries:
        path = store / SHARDS / f"{shard.name}.{TENSORS}"
        statistics.merge(LatentStatistics(np.array(shards.map_tensors(path)[STATISTICS])))
    columns: dict[str, str] = {}
    for record in records:
        columns |= {name: kind for name, kind in record.columns.items() if columns.get(name, "null") == "null"}
    complete = manifest.model_copy(
        update={
            "complete": True,
            "settings": tuple(dict.fromkeys(record.settings for record in records)),
            "samples": rows,
            "quarantined": len(bad),
            "columns": columns,
            "statistics": statistics.to_json(),
            "shards": tuple(entries),
        }
    )
    write_manifest(store, complete)
    _remove_leftovers(store)
    return complete


def _record(store: Path, unit: int) -> UnitRecord:
    record = units.read_record(store, unit)
    if record is None:
        raise WorkError(f"store {store}: unit {unit} is not done; run the same `ldm-vae encode` command again")
    return record


def _write_quarantine(store: Path, records: Sequence[UnitRecord]) -> None:
    lines = [
        json.dumps(entry.model_dump(mode="json"), ensure_ascii=False) + "\n"
        for record in records
        for entry in record.bad
    ]
    publish.replace(store / QUARANTINE, publish.data("".join(lines).encode()))


def _remove_leftovers(store: Path) -> None:
    """Temporary files of killed processes: every unit is done, so nobody needs them."""
    for folder in (store, store / SHARDS, store / UNITS):
        for path in folder.iterdir():
            if publish.is_temporary(path):
                with contextlib.suppress(OSError):
                    path.unlink()


def unit_statistics(read: ReadRows, specs: Sequence[TensorSpec], keys: Sequence[str]) -> npt.NDArray[np.float64]:
    """The table of sums over rows as they are stored, each image identified by its key."""
    by_name = {spec.name: spec for spec in specs}
    images = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
    statistics = LatentStatistics()
    for first in range(0, len(images), CHUNK_ROWS):
        stop = min(first + CHUNK_ROWS, len(images))
        mean = by_name.get("mean") or by_name["sample"]
        values = shards.to_float(read(mean, first, stop), mean.dtype)
        variance = None
        if "logvar" in by_name:
            logvar = shards.to_float(read(by_name["logvar"], first, stop), by_name["logvar"].dtype)
            variance = np.exp(logvar.astype(np.float64))
        statistics.update_values(values, variance, images[first:stop])
    assert statistics.sums is not None
    return statistics.sums
