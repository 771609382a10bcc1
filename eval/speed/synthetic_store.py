"""Latent stores of any size without an encoder, in the format of docs/latent_store_format.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm_vae.core.file_record import FileRecord
from ldm_vae.data.transforms import PREPROCESSING_VERSION
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    MAPPED_ROWS,
    ROWS,
    SHARDS,
    TENSOR_NAMES,
    TENSORS,
    UNITS,
    StoreKind,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    Recorded,
    Settings,
    ShardRecord,
    SourceIdentity,
    read_manifest,
    write_manifest,
)
from ldm_vae.latent_store.format.statistics import REPLICATES, LatentStatistics
from ldm_vae.latent_store.format.work_units import (
    Plan,
    UnitRecord,
    fresh_plan,
    record_name,
)
from ldm_vae.latent_store.storage.objects import LocalFolder

Shape = tuple[int, int, int]
NONE = {"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None, "latents_std": None}
NOTHING = FileRecord(bytes=0, sha256=hashlib.sha256(b"").hexdigest())
SETTINGS = Settings(batch_size=1, threads=1, device="cpu", memory_format="contiguous", torch="0")


def write_synthetic(
    store: Path, samples: int, shape: Shape = (8, 32, 32), unit: int = 2048, kind: StoreKind = "moments"
) -> None:
    """A finished store of fp16 moments, or of means or samples: random numbers, and a key for each."""
    (store / SHARDS).mkdir(parents=True)
    records = []
    for number, rows in enumerate(_counts(samples, unit)):
        draw = np.random.default_rng(number)
        values = {name: draw.normal(0, 1, (rows, *shape)).astype(np.float16) for name in TENSOR_NAMES[kind]}
        stem = store / SHARDS / f"{number:08d}"
        files = {TENSORS: _write_tensors(stem, values)}
        files |= shards.write_rows(
            LocalFolder(stem.parent), stem.name, pa.table({"key": [key(number * unit + row) for row in range(rows)]})
        )
        records.append(_record(number, rows, shape, files))
    write_manifest(store, _manifest(samples, records, unit, kind))


def write_sparse(store: Path, samples: int, shape: Shape, unit: int = 2048) -> None:
    """The same with tensors that are holes: they read as zeros and take no space; tables of
    keys are empty files."""
    (store / SHARDS).mkdir(parents=True)
    heads: dict[int, tuple[bytes, FileRecord]] = {}  # of a shard of so many rows
    records = []
    for number, rows in enumerate(_counts(samples, unit)):
        stem = store / SHARDS / f"{number:08d}"
        path = stem.with_suffix(f".{TENSORS}")
        if rows not in heads:
            file = _write_tensors(stem, {name: np.zeros((rows, *shape), np.float16) for name in ("mean", "logvar")})
            data = file.bytes - 2 * rows * int(np.prod(shape)) * 2
            heads[rows] = path.read_bytes()[:data], file
            path.unlink()
        head, file = heads[rows]
        with open(path, "wb") as out:
            out.write(head)
            out.truncate(file.bytes)
        for table in (ROWS, MAPPED_ROWS):
            stem.with_suffix(f".{table}").touch()
        records.append(_record(number, rows, shape, {TENSORS: file, ROWS: NOTHING, MAPPED_ROWS: NOTHING}))
    write_manifest(store, _manifest(samples, records, unit))


def write_empty(store: Path, samples: int, shape: Shape = (4, 32, 32), unit: int = 2048) -> None:
    """The manifest alone of a store of so many samples: what opening reads."""
    store.mkdir(parents=True)
    write_manifest(store, empty_manifest(samples, shape, unit))


def empty_manifest(samples: int, shape: Shape = (4, 32, 32), unit: int = 2048) -> Manifest:
    """Manifest of a store of so many samples."""
    file = {name: FileRecord(bytes=33_564_672, sha256="0" * 64) for name in (TENSORS, ROWS, MAPPED_ROWS)}
    records = [_record(number, rows, shape, file) for number, rows in enumerate(_counts(samples, unit))]
    return _manifest(samples, records, unit)


def unfinish(store: Path, source: SourceIdentity) -> Plan:
    """Take a finished store back to where every unit of `source` has its record and nothing is merged."""
    manifest, plan = read_manifest(store), fresh_plan(source)
    work = plan.digest(manifest.identity)
    (store / UNITS).mkdir()
    for shard in manifest.shards:
        record = UnitRecord(unit=shard.unit, samples=shard.rows, work=work, settings=SETTINGS, shards=(shard,))
        (store / record_name(shard.unit)).write_text(record.model_dump_json(), encoding="utf-8")
    write_manifest(store, manifest.model_copy(update={"complete": False, "shards": (), "source": source}))
    return plan


def key(number: int) -> str:
    """Key of a sample."""
    return f"{number:010d}"


# --- its parts --------------------------------------------------------------------------------------------------------


def _counts(samples: int, unit: int) -> list[int]:
    return [min(unit, samples - first) for first in range(0, samples, unit)]


def _write_tensors(stem: Path, values: Mapping[str, npt.NDArray[Any]]) -> FileRecord:
    rows, *shape = next(iter(values.values())).shape
    specs = [shards.TensorSpec(name, "F16", tuple(shape)) for name in values]
    sums = np.repeat(_sums(rows, tuple(shape)), 1 + REPLICATES, axis=0)
    spool = shards.Spool(stem.parent, specs)
    spool.append(values)
    record = shards.write_tensors(LocalFolder(stem.parent), stem.name, spool, sums, {})
    spool.close()
    return record


def _sums(rows: int, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """As if of a standard normal distribution [1, 2 + 3c]."""
    sums = np.full((1, 2 + 3 * shape[0]), float(rows * int(np.prod(shape[1:]))))
    sums[:, 0], sums[:, 2 : 2 + shape[0]] = rows, 0.0
    return sums


def _record(number: int, rows: int, shape: Shape, files: dict[str, FileRecord]) -> ShardRecord:
    resolution = shape[1] * 8
    return ShardRecord(
        name=f"{number:08d}", unit=number, rows=rows, shape=shape, resolution=resolution,
        size=(resolution, resolution), files=files,
    )  # fmt: skip


def _manifest(samples: int, records: list[ShardRecord], unit: int, kind: StoreKind = "moments") -> Manifest:
    identity = Identity(
        encoder="0" * 64, preprocessing=PREPROCESSING_VERSION, resolution=(records[0].resolution,), store=kind,
        dtype="fp16", mixed_precision="no", shard_size=unit,
    )  # fmt: skip
    return Manifest(
        complete=True, identity=identity, source=SourceIdentity(samples=samples, keys="0" * 64),
        recorded=Recorded(vae="none", data="synthetic", decoder="0" * 64, normalisation=NONE, tool="0"),
        units=len(records), samples=samples, columns={"key": "string"}, shards=tuple(records),
        statistics=LatentStatistics(_sums(samples, records[0].shape)).to_json(),
    )  # fmt: skip
