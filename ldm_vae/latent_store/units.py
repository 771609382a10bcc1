"""Work units: fixed slices of the source's index, each with its own record once its shards are on disk.

The record is published last, so a unit is done exactly when its record exists; everything else in the folder is either
named by a record or a leftover. Which process does a unit, and how often, does not change its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError
from tqdm import tqdm

from ldm_vae.config import Section
from ldm_vae.data.source import Source
from ldm_vae.latent_store import publish
from ldm_vae.latent_store.manifest import UNITS, Settings, ShardRecord, SourceIdentity


class BadSample(Section):
    """A source sample that is not in the store, and why."""

    index: int
    key: str
    reason: str
    image_sha256: str | None = None
    """Checksum of its bytes, where they could be had: an update tries it again only when they have changed."""


class UnitRecord(Section):
    """What became of one unit."""

    unit: int
    samples: int
    """Source samples in the unit, the bad ones included."""
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
        """How its files begin."""
        return f"{self.number:08d}"


def slices(samples: int, size: int) -> list[Unit]:
    """The units of a fresh store: [0, size), [size, 2 size), ..."""
    return [
        Unit(number, range(first, min(first + size, samples))) for number, first in enumerate(range(0, samples, size))
    ]


def record_path(store: Path, unit: int) -> Path:
    """Where a unit's record is."""
    return store / UNITS / f"{unit:08d}.json"


def read_record(store: Path, unit: int) -> UnitRecord | None:
    """A unit's record; None when there is none, or when it is damaged: then the unit is to be done."""
    try:
        return UnitRecord.model_validate_json(record_path(store, unit).read_bytes())
    except (OSError, ValidationError):
        return None


def write_record(store: Path, record: UnitRecord) -> None:
    """Publish a unit's record: from here on the unit is done.

    A record that is there already came from another process; where it does not describe the same files (an orphan with
    other settings), ours replaces it, since ours are the files that were published last.
    """
    path = record_path(store, record.unit)
    data = json.dumps(record.model_dump(mode="json"), ensure_ascii=False).encode() + b"\n"
    if not publish.create(path, publish.data(data)) and path.read_bytes() != data:
        publish.replace(path, publish.data(data))


def source_identity(source: Source) -> SourceIdentity:
    """Length and keys of a source: what the slices were cut from."""
    digest = hashlib.sha256()
    count = len(source)
    for index in tqdm(range(count), desc="keys", unit="keys", disable=None if count > 1_000_000 else True, leave=False):
        digest.update(f"{storable(source.key(index))}\n".encode())
    return SourceIdentity(samples=count, keys=digest.hexdigest())


def storable(text: str) -> str:
    """A key as it can be stored: file names that are not UTF-8 come as surrogates, which are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
