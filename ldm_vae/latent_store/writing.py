"""The writer: a source and a VAE become a latent store, by any number of processes, stopped and started at will.

Decoding (worker processes), encoding (threads) and writing (one thread) overlap; each unit ends with its record. There
is no collective in the loop: a process does the units that are its own and not done yet, and when all have their
records, one process finishes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm_vae import __version__
from ldm_vae.autoencoder import check_resolution, decoder_fingerprint, downsampling_factor, encoder_fingerprint
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import preprocessing_identity
from ldm_vae.errors import UsageError, WorkError
from ldm_vae.latent_store import preparing, publish, shards, units
from ldm_vae.latent_store.encoding import Encoder, Rows
from ldm_vae.latent_store.finishing import finish, unit_statistics
from ldm_vae.latent_store.manifest import (
    SHARDS,
    UNITS,
    ComputeDtype,
    Identity,
    Manifest,
    Recorded,
    ShardRecord,
    StorageDtype,
    StoreKind,
    check_identity,
    manifest_path,
    read_manifest,
)
from ldm_vae.latent_store.preparing import Prepared
from ldm_vae.latent_store.units import BadSample, Unit, UnitRecord
from ldm_vae.latents import Normalisation

BATCHES_AHEAD = 2  # per encoding thread: enough that none waits, few enough that memory stays flat


def write_store(
    vae: Any,
    source: Source,
    out: str | Path,
    *,
    resolution: int | Sequence[int],
    batch_size: int = 16,
    shard_size: int = 2048,
    store: StoreKind = "moments",
    dtype: StorageDtype = "fp16",
    mixed_precision: ComputeDtype = "no",
    num_workers: int = 0,
    encode_threads: int = 1,
    max_bad: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    device: torch.device | str = "cpu",
    source_name: str = "",
    vae_name: str = "",
) -> Manifest:
    """Encode every image of `source` into the store OUT, or go on where an earlier call was stopped.

    Args:
        vae: a diffusers AutoencoderKL (eval mode).
        resolution: side of the centre crop, a multiple of f; several give one shape each.
        batch_size: images per forward pass, and part of what byte identity depends on.
        shard_size: source samples per work unit.
        encode_threads: batches encoded at the same time, each with one torch thread.
        max_bad: share of unusable images above which the store is not finished.
        rank, world_size, barrier: this process, all processes, and how they wait for each other.
        source_name, vae_name: what the manifest and the column `source` call them.

    Raises:
        UsageError: OUT holds something else, or a store of another identity (the difference is named).
        WorkError: nothing usable, too many bad images, disk full: what was finished is kept.
    """
    out = Path(out)
    resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    for side in resolutions:
        check_resolution(side, downsampling_factor(vae))
    _at_least_one(batch_size=batch_size, shard_size=shard_size, encode_threads=encode_threads)
    manifest = Manifest(
        identity=Identity(
            encoder=encoder_fingerprint(vae),
            preprocessing=preprocessing_identity(source.decoding),
            resolution=resolutions,
            store=store,
            dtype=dtype,
            mixed_precision=mixed_precision,
            shard_size=shard_size,
        ),
        source=units.source_identity(source),
        recorded=Recorded(
            vae=vae_name,
            decoder=decoder_fingerprint(vae),
            normalisation=Normalisation.from_config(vae.config).to_config(),
            tool=__version__,
        ),
    )
    manifest = begin(out, manifest)
    if not manifest.complete:
        encoder = Encoder(
            vae, batch_size=batch_size, store=store, dtype=dtype, mixed_precision=mixed_precision, device=device
        )
        own = units.slices(len(source), shard_size)[rank::world_size]
        pending = [unit for unit in own if units.read_record(out, unit.number) is None]
        work = _Work(out, manifest.identity, encoder, threads=encode_threads, show=rank == 0)
        work.run(source, source_name, pending, num_workers)
        barrier()
        if rank == 0:
            finish(out, max_bad=max_bad)
        barrier()
    return read_manifest(out)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")


def begin(out: Path, manifest: Manifest) -> Manifest:
    """Make OUT with an incomplete manifest, or check that the one in it may be gone on with; the manifest that counts.

    Raises:
        UsageError: OUT holds something else, or a store of another identity or source.
        WorkError: OUT cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"OUT {out}: expected a folder, got a file")
        if not manifest_path(out).exists() and out.exists() and any(not _ours(path) for path in out.iterdir()):
            raise UsageError(f"OUT {out}: holds something that is not a latent store; choose an empty or new folder")
        for name in (SHARDS, UNITS):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkError(f"OUT {out}: cannot be made: {error.strerror}") from error
    if not manifest_path(out).exists():
        publish.create(manifest_path(out), publish.data(manifest.to_bytes()))
    existing = read_manifest(out)
    check_identity(out, existing.identity, manifest.identity)
    if existing.source != manifest.source:
        raise UsageError(
            f"OUT {out}: was begun from other images ({existing.source.samples:,} of them, DATA has "
            f"{manifest.source.samples:,}); --update takes up what was added, changed and removed"
        )
    return existing


def _ours(path: Path) -> bool:
    return path.name in (SHARDS, UNITS) or publish.is_temporary(path)


@dataclass
class _OpenUnit:
    """A unit that is being written: one spool per latent shape."""

    unit: Unit
    spools: dict[tuple[int, int, int], shards.Spool] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], list[dict[str, Any]]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)

    def close(self) -> None:
        for spool in self.spools.values():
            spool.close()


class _Work:
    """The pipeline of one process: batches in, unit records out."""

    def __init__(self, out: Path, identity: Identity, encoder: Encoder, *, threads: int, show: bool) -> None:
        self._out, self._identity, self._encoder, self._threads, self._show = out, identity, encoder, threads, show
        self._open: _OpenUnit | None = None
        self._parent = os.getppid() if "LOCAL_RANK" in os.environ else None

    def run(self, source: Source, source_name: str, pending: Sequence[Unit], num_workers: int) -> None:
        """Do the pending units, in order."""
        total = sum(len(unit.indices) for unit in pending)
        stream = preparing.batches(
            source, source_name, self._identity.resolution, pending, self._encoder.batch_size, num_workers
        )
        waiting: deque[Future[int]] = deque()
        with (
            ThreadPoolExecutor(self._threads, "encode", initializer=torch.set_num_threads, initargs=(1,)) as encoders,
            ThreadPoolExecutor(1, "write") as writer,
            tqdm(total=total, desc="encode", unit="img", disable=None if self._show else True) as bar,
        ):
            try:
                for batch in stream:
                    encoded = [(part, encoders.submit(self._encode, part)) for part in _by_size(batch.good)]
                    waiting.append(writer.submit(self._write, batch, encoded))
                    while len(waiting) > BATCHES_AHEAD * self._threads or (waiting and waiting[0].done()):
                        bar.update(waiting.popleft().result())
                while waiting:
                    bar.update(waiting.popleft().result())
            except BaseException:
                encoders.shutdown(wait=False, cancel_futures=True)
                writer.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                if self._open is not None:
                    self._open.close()

    def _encode(self, part: Sequence[Prepared]) -> tuple[Rows, list[str | None]]:
        return self._encoder([prepared.pixels for prepared in part], [prepared.index for prepared in part])

    def _write(self, batch: preparing.Batch, encoded: list[tuple[list[Prepared], Future[Any]]]) -> int:
        """Spool a batch; with the last one of a unit, publish it. Returns the number of samples dealt with."""
        if self._open is None:
            self._stop_without_parent()
            self._open = _OpenUnit(batch.unit)
        unit = self._open
        unit.bad += batch.bad
        for part, future in encoded:
            rows, reasons = future.result()
            self._spool(unit, part, rows, reasons)
        if batch.last:
            self._publish(unit)
            unit.close()
            self._open = None
        return len({prepared.index for prepared in batch.good}) + len(batch.bad)

    def _spool(self, unit: _OpenUnit, part: Sequence[Prepared], rows: Rows, reasons: Sequence[str | None]) -> None:
        shape = next(iter(rows.values())).shape[1:]
        if shape not in unit.spools:
            unit.spools[shape] = shards.Spool(self._out / SHARDS, self._encoder.specs(shape))
            unit.rows[shape] = []
        usable = [reason is None for reason in reasons]
        unit.spools[shape].append({name: value[usable] for name, value in rows.items()})
        for prepared, reason in zip(part, reasons, strict=True):
            if reason is None:
                unit.rows[shape].append(prepared.row)
            else:
                row = prepared.row
                unit.bad.append(
                    BadSample(index=prepared.index, key=row["key"], reason=reason, image_sha256=row["image_sha256"])
                )

    def _publish(self, unit: _OpenUnit) -> None:
        self._stop_without_parent()
        written: list[ShardRecord] = []
        columns: dict[str, str] = {}
        for shape, spool in sorted(unit.spools.items()):
            if spool.rows:
                record, types = self._publish_shard(unit, shape, spool)
                written.append(record)
                columns |= types
        units.write_record(
            self._out,
            UnitRecord(
                unit=unit.unit.number,
                samples=len(unit.unit.indices),
                settings=self._encoder.settings,
                shards=tuple(written),
                bad=tuple(sorted(unit.bad, key=lambda bad: bad.index)),
                columns=columns,
            ),
        )

    def _publish_shard(
        self, unit: _OpenUnit, shape: tuple[int, int, int], spool: shards.Spool
    ) -> tuple[ShardRecord, dict[str, str]]:
        one_shape = len(self._identity.resolution) == 1
        name = unit.unit.name if one_shape else f"{unit.unit.name}-{shape[1]}x{shape[2]}"
        stem = self._out / SHARDS / name
        rows = unit.rows[shape]
        statistics = unit_statistics(spool.read, spool.specs, [row["key"] for row in rows])
        metadata = {"encoder": self._identity.encoder, "unit": str(unit.unit.number)}
        table = shards.to_table(rows)
        tensors = stem.with_name(f"{name}.{shards.TENSORS}")
        files = {shards.TENSORS: shards.write_tensors(tensors, spool, statistics, metadata)}
        files |= shards.write_rows(stem, table)
        record = ShardRecord(name=name, unit=unit.unit.number, rows=spool.rows, shape=shape, files=files)
        return record, {field.name: str(field.type) for field in table.schema}

    def _stop_without_parent(self) -> None:
        """A rank whose launcher was killed stops: the next launch does its units."""
        if self._parent is not None and os.getppid() != self._parent:
            raise WorkError("the launcher is gone; this process stops, what it finished is kept")


def _by_size(good: Sequence[Prepared]) -> list[list[Prepared]]:
    """Samples of equal crop size together, in order."""
    groups: dict[tuple[int, ...], list[Prepared]] = {}
    for prepared in good:
        groups.setdefault(tuple(prepared.pixels.shape), []).append(prepared)
    return list(groups.values())
