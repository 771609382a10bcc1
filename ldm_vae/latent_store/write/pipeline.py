"""The pipeline of one process: samples in, finished units out.

Decoding (worker processes), encoding (threads) and writing (one thread) overlap. Rows of one shape are gathered into
full batches across the samples that are missing; a unit's last batch is padded, never mixed with the next unit's.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm_vae.core import atomic_io
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.format import shards, work_units
from ldm_vae.latent_store.format.manifest import ShardRecord
from ldm_vae.latent_store.format.publication import Group, publish_shard
from ldm_vae.latent_store.format.work_units import BadSample, Unit, UnitRecord
from ldm_vae.latent_store.storage.claims import Owner
from ldm_vae.latent_store.storage.places import Place, storage_at
from ldm_vae.latent_store.write.encoder import EncodedRows, Encoder, Reason
from ldm_vae.latent_store.write.sample_stream import Dealt, Ready

BATCHES_AHEAD = 2  # per encoding thread: enough that none waits, few enough that memory stays flat


@dataclass
class _OpenUnit:
    """A unit that is being written: one spool per group."""

    unit: Unit
    spools: dict[Group, shards.Spool] = field(default_factory=dict)
    rows: dict[Group, list[dict[str, Any]]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)

    def close(self) -> None:
        for spool in self.spools.values():
            spool.close()


class _Busy:
    """Seconds during which at least one encode was under way."""

    def __init__(self) -> None:
        self.seconds, self._running, self._since, self._lock = 0.0, 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._running == 0:
                self._since = time.perf_counter()
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self.seconds += time.perf_counter() - self._since


class Pipeline:
    """Encodes samples into units of the store OUT; `bad` counts those that could not be used.

    Args:
        work: digest of the plan, which the records carry.
        owner: checked before a unit is published: OUT must still be this job's.
        threads: batches encoded at the same time.
        show: whether this process has the progress bar.
    """

    def __init__(self, out: Place, encoder: Encoder, work: str, owner: Owner, *, threads: int, show: bool) -> None:
        self._out, self._encoder, self._work, self._owner = out, encoder, work, owner
        self._threads, self._show = threads, show
        self._storage, self._busy = storage_at(out), _Busy()
        self._open: _OpenUnit | None = None
        self._gathered: dict[Group, list[Ready]] = {}
        self.bad = 0

    def run(self, stream: Iterable[Dealt], total: int) -> None:
        """Deal with all samples of `stream`; every unit in it has its record when this returns.

        Raises:
            WorkError: the disk is full, ...; units that have their record stay.
        """
        waiting: deque[Future[int]] = deque()
        started = time.perf_counter()
        with (
            # each encoding thread computes with one torch thread: stored bits depend on that number (see encoder.py)
            ThreadPoolExecutor(self._threads, "encode", initializer=torch.set_num_threads, initargs=(1,)) as encoders,
            # one writing thread takes batches in the order of submission, so rows keep the order of the samples
            ThreadPoolExecutor(1, "write") as writer,
            Progress(total=total, desc="encode", unit="img", disable=not self._show, smoothing=0.05) as bar,
        ):
            try:
                for batch, dealt in self._batches(stream):
                    encoded = encoders.submit(self._encode, batch) if batch else None
                    # the writing task waits for its encode: tasks end in order, and waiting[0] is the oldest
                    waiting.append(writer.submit(self._write, batch, encoded, dealt))
                    # the bound holds back decoding: crops and rows that wait stay in memory until they are written
                    while len(waiting) > BATCHES_AHEAD * self._threads or (waiting and waiting[0].done()):
                        bar.update(waiting.popleft().result())
                        share = self._busy.seconds / (time.perf_counter() - started)
                        bar.set_postfix_str(f"encoder busy {share:.0%}, quarantined {self.bad}", refresh=False)
                while waiting:
                    bar.update(waiting.popleft().result())
            except BaseException:
                # Encodes that have not begun are dropped. The writer is waited for: `finally` closes the spool that it
                # may be writing to.
                encoders.shutdown(wait=False, cancel_futures=True)
                writer.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                if self._open is not None:
                    # a spool has no name, so closing it gives the disk space back and leaves nothing in the store
                    self._open.close()

    def _batches(self, stream: Iterable[Dealt]) -> Iterable[tuple[list[Ready], list[Dealt]]]:
        """Full batches of one group, each with the samples that were dealt with since the one before."""
        dealt: list[Dealt] = []
        for sample in stream:
            dealt.append(sample)
            for ready in sample.ready:
                gathered = self._gathered.setdefault(ready.group, [])
                gathered.append(ready)
                # handed over as soon as it is full; the samples follow at the end of the unit, or in portions below
                if len(gathered) == self._encoder.batch_size:
                    yield self._gathered.pop(ready.group), []
            if sample.last:
                # The unit's end flushes every group, full or not: a unit's batches, and so its bytes, depend on its own
                # samples alone. The samples come after the batches, since the last one makes the writer publish.
                rest, self._gathered = list(self._gathered.values()), {}
                for gathered in rest:
                    yield gathered, []
                yield [], dealt
                dealt = []
            elif len(dealt) >= self._encoder.batch_size:
                # bad samples need no encode: without this a unit of bad images would show no progress until its end
                yield [], dealt
                dealt = []

    def _encode(self, batch: Sequence[Ready]) -> tuple[EncodedRows, list[Reason]]:
        with self._busy:
            return self._encoder(batch)

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _write(
        self, batch: list[Ready], encoded: Future[tuple[EncodedRows, list[Reason]]] | None, dealt: list[Dealt]
    ) -> int:
        """Spool a batch; at the end of a unit, publish it. Returns how many samples were dealt with."""
        try:
            if encoded is not None:
                rows, reasons = encoded.result()
                self._spool(batch, rows, reasons)
            for sample in dealt:
                unit = self._unit(sample.unit)
                if sample.bad is not None:
                    unit.bad.append(sample.bad)
                    self.bad += 1
                if sample.last:
                    self._publish(unit)
                    unit.close()
                    self._open = None
        except OSError as error:
            place = self._out if isinstance(self._out, Path) else Path(tempfile.gettempdir())  # where its spools are
            raise atomic_io.explained(error, place) from error
        return len(dealt)

    def _unit(self, unit: Unit) -> _OpenUnit:
        if self._open is None:
            self._open = _OpenUnit(unit)
        return self._open

    def _spool(self, batch: Sequence[Ready], rows: EncodedRows, reasons: Sequence[Reason]) -> None:
        unit, group = self._unit(batch[0].unit), batch[0].group
        # opened at the group's first batch, which tells the shape of its crops
        if group not in unit.spools:
            specs = self._encoder.specs(*batch[0].crops[""].shape)
            unit.spools[group] = shards.Spool(self._storage.scratch, specs)
            unit.rows[group] = []
        # a row that cannot be stored leaves no gap: its tensors and its columns are both left out
        usable = [reason is None for reason in reasons]
        unit.spools[group].append({name: value[usable] for name, value in rows.items()})
        for sample, reason in zip(batch, reasons, strict=True):
            if reason is None:
                unit.rows[group].append(sample.row)
            else:
                row = sample.row
                unit.bad.append(
                    BadSample(index=sample.index, key=row["key"], reason=reason, image_sha256=row["image_sha256"])
                )
                self.bad += 1

    def _publish(self, unit: _OpenUnit) -> None:
        # another job may have taken OUT over while this process was suspended
        self._owner.check()
        written: list[ShardRecord] = []
        columns: dict[str, str] = {}
        # in the order of groups, not of their first batch, so that equal rows give equal records
        for group, spool in sorted(unit.spools.items()):
            # every row of the group may have been unusable
            if spool.rows:
                record, types = publish_shard(
                    self._storage, self._encoder.identity, unit.unit.number, group, spool, unit.rows[group]
                )
                written.append(record)
                columns |= types
        # last: with its record the unit is done, and its shards are never made again
        work_units.write_record(
            self._out,
            UnitRecord(
                unit=unit.unit.number,
                samples=len(unit.unit.indices),
                work=self._work,
                settings=self._encoder.settings,
                shards=tuple(written),
                # the decoder's bad samples and the encoder's arrive interleaved
                bad=tuple(sorted(unit.bad, key=lambda bad: bad.index)),
                columns=columns,
            ),
        )
