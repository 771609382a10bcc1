"""Work units: fixed slices of the source's index, each with its own record once its shards are on disk.

The record is published last, so a unit is done exactly when its record exists; everything else in the folder is either
named by a record or a leftover. Which process does a unit, and how often, does not change its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field, ValidationError, model_validator

from ldm_vae.core.ahead import ahead
from ldm_vae.core.config import Section
from ldm_vae.core.progress import Progress
from ldm_vae.data.source import Source, each_key
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import PLAN, SHARDS, UNITS, shard_file
from ldm_vae.latent_store.format.manifest import (
    Settings,
    ShardRecord,
    SourceIdentity,
)
from ldm_vae.latent_store.storage.places import Place, storage_at


class BadSample(Section):
    """A source sample that is not in the store, and why."""

    index: int
    key: str
    reason: str
    image_sha256: str | None = None
    """Checksum of its bytes, where they could be had: an update tries it again only when they have changed."""


class UnitRecord(Section):
    """Record of one finished unit: its shards, its bad samples, and the settings it was computed with."""

    unit: int
    samples: int
    """Source samples in the unit, the bad ones included."""
    work: str
    """Digest of the store's identity and the plan that the unit is of: a record of another does not count."""
    settings: Settings
    shards: tuple[ShardRecord, ...]
    bad: tuple[BadSample, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)
    """Arrow type of each column of the parquet."""


@dataclass(frozen=True)
class Unit:
    """Unit `number`: these indices of the source, in this order."""

    number: int
    indices: Sequence[int]

    @property
    def name(self) -> str:
        """Prefix of its files' names."""
        return f"{self.number:08d}"


class Plan(Section):
    """Plan of what to encode next; a fresh store is the plan that appends the whole source to an empty store.

    A plan that adds to a finished store is kept in plan.json until its units are merged, so that it can be stopped too.
    """

    source: SourceIdentity
    first_unit: int
    ranges: tuple[tuple[int, int], ...]
    """Source indices [first, stop) to append, in order."""
    removed: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By shard name, rows that the store loses."""
    bad: tuple[BadSample, ...] = ()
    """Entries of the quarantine that stay."""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        places = [place for pair in self.ranges for place in pair]
        if sorted(places) != places or not all(0 <= place <= self.source.samples for place in places):
            raise ValueError("ranges: expected ascending indices of the source")
        return self

    def digest(self, identity: Identity) -> str:
        """Digest that its records carry, so that a record of another plan does not count."""
        return hashlib.sha256(f"{identity.digest} {self.model_dump_json()}".encode()).hexdigest()

    @property
    def samples(self) -> int:
        """Number of samples that it appends."""
        return sum(stop - first for first, stop in self.ranges)

    def units(self, size: int) -> list[Unit]:
        """Slices of `size` samples: units first_unit, first_unit + 1, ..."""
        # a range, and its slices, take no memory at 10^9 samples
        if len(self.ranges) == 1:
            indices: Sequence[int] = range(*self.ranges[0])
        else:
            indices = [index for first, stop in self.ranges for index in range(first, stop)]
        return [
            Unit(self.first_unit + number, indices[first : first + size])
            for number, first in enumerate(range(0, len(indices), size))
        ]


def fresh_plan(source: SourceIdentity) -> Plan:
    """Plan that encodes the whole source into an empty store."""
    return Plan(source=source, first_unit=0, ranges=((0, source.samples),))


def read_plan(store: Place, units_so_far: int) -> Plan | None:
    """The update that is under way; None when there is none, or when it was merged and only its file is left."""
    try:
        plan = Plan.model_validate_json(storage_at(store).read(PLAN))
    except (OSError, ValidationError):
        return None
    # a merge counts its units in the manifest, so a smaller first unit is that of a merged plan
    return plan if plan.first_unit >= units_so_far else None


def write_plan(store: Place, plan: Plan) -> None:
    """Keep a plan until it is merged."""
    storage_at(store).replace(PLAN, plan.model_dump_json().encode() + b"\n")


def record_name(unit: int) -> str:
    """The name of a unit's record within its store."""
    return f"{UNITS}/{unit:08d}.json"


def read_record(store: Place, unit: int, work: str) -> UnitRecord | None:
    """A unit's record; None when the unit is to be done: there is none, it is damaged, or of other work."""
    try:
        record = UnitRecord.model_validate_json(storage_at(store).read(record_name(unit)))
    except (OSError, ValidationError):
        return None
    # of another identity or plan: the unit of this number is another one
    return record if (record.unit, record.work) == (unit, work) else None


def read_records(store: Place, units: Iterable[Unit], work: str) -> Iterator[UnitRecord | None]:
    """The records of some units, in order; of an object store several at a time."""
    return ahead(lambda unit: read_record(store, unit.number, work), units, storage_at(store).connections)


def done_records(store: Place, units: Iterable[Unit], work: str) -> Iterator[UnitRecord]:
    """The records of those of some units that are done: they have one, and all their files the sizes that it says."""
    storage = storage_at(store)
    records, files = storage.sizes(UNITS), storage.sizes(SHARDS)
    begun = (unit for unit in units if records(record_name(unit.number)) >= 0)
    for record in read_records(store, begun, work):
        # sizes, not checksums: those of a whole store would take as long as reading it
        if record is not None and all(
            files(shard_file(shard.name, extension)) == file.bytes
            for shard in record.shards
            for extension, file in shard.files.items()
        ):
            yield record


def are_done(store: Place, units: Sequence[Unit], work: str) -> bool:
    """True if all these units are done. While some have no record, it costs one listing of a folder."""
    there = {*storage_at(store).names(UNITS)}
    return all(record_name(unit.number) in there for unit in units) and len(units) == sum(
        1 for _ in done_records(store, units, work)
    )


def write_record(store: Place, record: UnitRecord) -> None:
    """Publish a unit's record: from here on the unit is done.

    A record that is there already came from another process; where it does not describe the same files (an orphan with
    other settings), ours replaces it, since ours are the files that were published last.
    """
    content = json.dumps(record.model_dump(mode="json"), ensure_ascii=False).encode() + b"\n"
    storage_at(store).publish(record_name(record.unit), lambda file: file.write(content))


def source_identity(source: Source) -> SourceIdentity:
    """Length and keys of a source, from which the slices are cut. Raises UsageError as `each_key`."""
    digest = hashlib.sha256()
    count = len(source)
    bar = Progress(each_key(source), "keys", count, unit="keys", disable=count <= 1_000_000, leave=False)
    for key in bar:
        digest.update(f"{storable(key)}\n".encode())
    return SourceIdentity(samples=count, keys=digest.hexdigest())


def storable(text: str) -> str:
    """A key as it can be stored: file names that are not UTF-8 come as surrogates, which are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
