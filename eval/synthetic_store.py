"""Latent stores of any size without an encoder: random moments, in the format of docs/latent_store.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ldm_vae.data.transforms import PREPROCESSING_VERSION
from ldm_vae.latent_store import shards
from ldm_vae.latent_store.layout import ROWS, SHARDS, TENSORS
from ldm_vae.latent_store.manifest import (
    FileRecord,
    Identity,
    Manifest,
    Recorded,
    ShardRecord,
    SourceIdentity,
    write_manifest,
)

NONE = {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None, "latents_std": None}


def write_synthetic(store: Path, samples: int, shape: tuple[int, int, int] = (8, 32, 32), unit: int = 2048) -> None:
    """A finished store of fp16 moments."""
    (store / SHARDS).mkdir(parents=True)
    specs = [shards.TensorSpec(name, "F16", shape) for name in ("mean", "logvar")]
    records = []
    for number, first in enumerate(range(0, samples, unit)):
        rows = min(unit, samples - first)
        draw = np.random.default_rng(number)
        spool = shards.Spool(store / SHARDS, specs)
        spool.append({spec.name: draw.normal(0, 1, (rows, *shape)).astype(np.float16) for spec in specs})
        stem = store / SHARDS / f"{number:08d}"
        files = {TENSORS: shards.write_tensors(stem.with_suffix(f".{TENSORS}"), spool, np.zeros((2, 2)), {})}
        files |= shards.write_rows(stem, pa.table({"key": [f"{first + row:08d}" for row in range(rows)]}))
        spool.close()
        records.append(_record(number, rows, shape, files))
    write_manifest(store, _manifest(samples, records, unit))


def write_empty(store: Path, samples: int, shape: tuple[int, int, int] = (4, 32, 32), unit: int = 2048) -> None:
    """The manifest alone of a store of so many samples: what opening reads."""
    store.mkdir(parents=True)
    file = {name: FileRecord(bytes=1, sha256="0" * 64) for name in (TENSORS, ROWS)}
    counts = [min(unit, samples - first) for first in range(0, samples, unit)]
    write_manifest(store, _manifest(samples, [_record(k, rows, shape, file) for k, rows in enumerate(counts)], unit))


def _record(number: int, rows: int, shape: tuple[int, int, int], files: dict[str, FileRecord]) -> ShardRecord:
    resolution = shape[1] * 8
    return ShardRecord(
        name=f"{number:08d}", unit=number, rows=rows, shape=shape, resolution=resolution,
        size=(resolution, resolution), files=files,
    )  # fmt: skip


def _manifest(samples: int, records: list[ShardRecord], unit: int) -> Manifest:
    identity = Identity(
        encoder="0" * 64, preprocessing=PREPROCESSING_VERSION, resolution=(records[0].resolution,), store="moments",
        dtype="fp16", mixed_precision="no", shard_size=unit,
    )  # fmt: skip
    return Manifest(
        complete=True, identity=identity, source=SourceIdentity(samples=samples, keys="0" * 64),
        recorded=Recorded(vae="none", data="synthetic", decoder="0" * 64, normalisation=NONE, tool="0"),
        units=len(records), samples=samples, columns={"key": "string"}, shards=tuple(records),
    )  # fmt: skip
