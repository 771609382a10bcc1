"""Updates: what was added to, changed in and removed from the source since a store was made.

Images are compared by key, by the checksum of their bytes and by their other columns (caption, label). A new image is
appended; a changed one is appended and its old rows are taken out; rows of an image that is gone are taken out. Nothing
else is touched: taken out means named in the manifest, the shard's files stay as they are.

Keys and checksums are held as 16 bytes each: 10^7 rows need 480 MB here, the only place that needs all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm_vae.core.progress import Progress
from ldm_vae.data.metadata import columns_digest
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Source, image_checksum
from ldm_vae.data.stamps import stamp_now
from ldm_vae.data.workers import load
from ldm_vae.latent_store.format import shards, work_units
from ldm_vae.latent_store.format.layout import (
    IMAGE_BYTES,
    PLAN,
    ROWS,
    SHARDS,
    is_own,
    passed_on,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    SourceIdentity,
    write_manifest,
)
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.format.work_units import BadSample, Plan, storable
from ldm_vae.latent_store.remote.at_hand import opened, rows_of
from ldm_vae.latent_store.storage.places import Place, storage_at
from ldm_vae.latent_store.write.finalize import finish
from ldm_vae.latent_store.write.freshness_cache import Sightings, sighting

logger = logging.getLogger(__name__)

DIGEST = 16  # bytes of a hash: two of 10^9 keys fall together once in 10^20 stores
CHUNK = 256  # images per task of a worker

Digests = npt.NDArray[np.bytes_]


class StoredImages:
    """All live rows of a store, found by key: their `images` (the first half of each SHA-256), and how many `bytes`
    those had (-1: an older version of this tool did not write it, or the latents came from another program).

    Args:
        columns: of the source. In a store that an older version made one called `image_bytes` is not ours.
    """

    def __init__(self, store: Place, manifest: Manifest, columns: Collection[str] = ()) -> None:
        keys, images, sizes, places = [], [], [], []
        for number, shard in enumerate(manifest.shards):
            passed_on = f"source_{IMAGE_BYTES}"
            table = rows_of(store, shard, ["key", "image_sha256"], shard.rows, [IMAGE_BYTES, passed_on])
            live = shard.live_rows
            keys.append(digests(table.column("key").take(live).to_pylist()))
            images.append(shortened(table.column("image_sha256").take(live).to_pylist()))
            # an older version passed a source's own column `image_bytes` on under that name: no size of ours
            theirs = IMAGE_BYTES in columns and passed_on not in table.column_names
            known = IMAGE_BYTES in table.column_names and not theirs
            sizes.append(_sizes(table.column(IMAGE_BYTES).take(live)) if known else np.full(len(live), -1, np.int64))
            places.append(np.stack([np.full_like(live, number), live], axis=1))
        # sorted once and searched for every chunk; stable, so a key's rows stay in the order of the shards
        order = np.argsort(joined := np.concatenate(keys), kind="stable")
        self._keys, self.images = joined[order], np.concatenate(images)[order]
        self.bytes = np.concatenate(sizes)[order]
        self._places = np.concatenate(places)[order]
        self._names = [shard.name for shard in manifest.shards]
        self._store, self._shards = store, manifest.shards
        self._said: dict[int, npt.NDArray[np.void]] = {}

    def find(self, keys: Digests) -> list[slice]:
        """Slice of the rows of each key (several, if there are several resolutions); an empty slice if none."""
        return [slice(a, b) for a, b in zip(*(ends.tolist() for ends in self.bounds(keys)), strict=True)]

    def bounds(self, keys: Digests) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First row of each key, and one past its last."""
        return np.searchsorted(self._keys, keys, "left"), np.searchsorted(self._keys, keys, "right")

    def columns(self) -> set[str]:
        """Names of the columns that came from the source."""
        return {
            name
            for shard in self._shards
            for name in opened(self._store, shard, ROWS, lambda path: shards.row_columns(path.with_suffix("")))
            if not is_own(name)
        }

    def said(self, row: int) -> bytes:
        """The digest of a row's columns that came from the source; a shard is read when it is first asked for."""
        number, place = self._places[row].tolist()
        if number not in self._said:
            self._said[number] = said_by_rows(self._store, self._shards[number])
        return bytes(self._said[number][place])

    def __len__(self) -> int:
        return len(self._keys)

    def by_shard(self, chosen: npt.NDArray[np.bool_]) -> dict[str, tuple[int, ...]]:
        """Chosen rows [len] as rows of each shard."""
        places = self._places[chosen]
        return {
            self._names[number]: tuple(sorted(places[places[:, 0] == number, 1].tolist()))
            for number in np.unique(places[:, 0]).tolist()
        }


def make_plan(
    store: Place,
    manifest: Manifest,
    identity: SourceIdentity,
    source: Source,
    sightings: Sightings,
    *,
    retry: bool,
    num_workers: int,
) -> Plan | None:
    """Compare a finished store with its source; None when they agree. All images are read, and what was seen is kept.

    An image whose bytes cannot be read now, but were encoded before, keeps its row: a disk that is away for a moment
    does not empty a store.
    """
    stored = StoredImages(store, manifest)
    quarantined = {entry.key: entry for entry in read_quarantine(store)}
    keep = np.zeros(len(stored), dtype=bool)
    append: list[int] = []
    bad: list[BadSample] = []
    unreadable = 0
    progress = Progress(total=len(source), desc="compare", unit="img", leave=False)
    for indices, looks in checksums(source, range(len(source)), num_workers):
        # kept before anything is decided: a sighting is true of the image whatever becomes of the plan
        sightings.add(look.sighting for look in looks)
        keys = [storable(source.key(index)) for index in indices]
        for index, key, rows, look in zip(indices, keys, stored.find(digests(keys)), looks, strict=True):
            entry, checksum = quarantined.get(key), look.checksum
            if rows.start < rows.stop:
                # an unreadable image counts as unchanged (see above); the key's first row stands for all of them
                image = checksum is None or stored.images[rows.start] == shortened([checksum])[0]
                same = image and (checksum is None or stored.said(rows.start) == look.said)
                unreadable += checksum is None
                keep[rows] = same
                # changed, or bad at one of its resolutions and tried again: all its rows are made anew
                if not same or (entry is not None and retry):
                    append.append(index)
                    keep[rows] = False
                elif entry is not None:
                    bad.append(entry.model_copy(update={"index": index}))
            elif entry is not None and entry.image_sha256 == checksum and not retry:
                # bad before, and the same bytes now: it would fail again
                bad.append(entry.model_copy(update={"index": index}))
            else:
                append.append(index)
        progress.update(len(keys))
    if unreadable:
        logger.warning("%d images cannot be read now and keep the latents that they have", unreadable)
    # rows that no image has claimed: changed, or gone from the source
    removed = stored.by_shard(~keep)
    if not append and not removed and identity == manifest.source:
        return None
    return Plan(source=identity, first_unit=manifest.units, ranges=_ranges(append), removed=removed, bad=tuple(bad))


def adopt_finished_units(store: Place, manifest: Manifest, wanted: Manifest) -> Manifest:
    """Finish a partial store whose source has changed: the units that are done become all of it."""
    planned = work_units.fresh_plan(manifest.source)
    work = planned.digest(manifest.identity)
    # nothing done, nothing to keep: the store then begins anew with the images of now
    done = any(work_units.read_records(store, planned.units(manifest.identity.shard_size), work))
    if done:
        return finish(store, manifest, planned, partly=True)
    write_manifest(store, wanted)
    return wanted


def forget(store: Place, plan: Plan, manifest: Manifest) -> None:
    """Throw away an update that was begun and is overtaken by newer changes of the source."""
    # the plan first: after a kill in the middle nothing refers to the files that are left, and the next plan's replace
    # them
    storage = storage_at(store)
    storage.remove(PLAN)
    units = plan.units(manifest.identity.shard_size)
    for unit in units:
        storage.remove(work_units.record_name(unit.number))
    shards = tuple(f"{SHARDS}/{unit.name}" for unit in units)
    for name in storage.names(SHARDS):
        if name.startswith(shards):
            storage.remove(name)


# --- checksums --------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """An image's identity when it is read: its SHA-256 (None when it cannot be read), its sighting, and the digest of
    its other columns."""

    checksum: str | None
    sighting: int
    said: bytes


class _Checksums:
    """Reads the source's images in worker processes and returns a `Look` at each."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitems__(self, indices: Sequence[int]) -> list[Look]:
        return [self._look(index) for index in indices]

    def _look(self, index: int) -> Look:
        # before the bytes are read: a file replaced in between keeps the older stamp, and its sighting never matches
        stamp = stamp_now(self._source, index)
        with contextlib.suppress(BadImage):
            record = self._source[index]
            checksum = image_checksum(record.image)
            return Look(checksum, sighting(stamp, checksum), said(passed_on(record.columns)))
        return Look(None, 0, b"")


def said(columns: Mapping[str, Any]) -> bytes:
    """The digest of a row's columns that came from the source. Without a column `image_bytes` of the source's: a store
    of an older version has it under that name."""
    return columns_digest({name: value for name, value in columns.items() if name != f"source_{IMAGE_BYTES}"})


def checksums(
    source: Source, indices: range | npt.NDArray[np.int64], num_workers: int
) -> Iterator[tuple[list[int], list[Look]]]:
    """(indices, looks at those images), chunk by chunk."""

    def pieces() -> Iterator[list[int]]:
        return ([*map(int, indices[first : first + CHUNK])] for first in range(0, len(indices), CHUNK))

    yield from zip(pieces(), load(_Checksums(source), pieces(), num_workers, False, 2, None), strict=True)


def said_by_rows(store: Place, shard: ShardRecord) -> npt.NDArray[np.void]:
    """`said` of all rows of a shard; not as `Digests`, whose elements come back without zeros at their end."""
    table = rows_of(store, shard, rows=shard.rows)
    theirs = table.select([name for name in table.column_names if not is_own(name)])
    return np.array([said(row) for row in theirs.to_pylist()], dtype=f"V{DIGEST}")


def digests(texts: Sequence[str]) -> Digests:
    """A short hash of each text, in an array that can be sorted and searched."""
    hashes = [hashlib.blake2b(text.encode(), digest_size=DIGEST).digest() for text in texts]
    return np.array(hashes, dtype=f"S{DIGEST}")


def shortened(checksums: Sequence[str | None]) -> Digests:
    """The first half of each SHA-256; of an image whose checksum nobody knows, nothing."""
    return np.array([bytes.fromhex((checksum or "")[: 2 * DIGEST]) for checksum in checksums], dtype=f"S{DIGEST}")


def _sizes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A column `image_bytes`, -1 for null, and for what is no size."""
    if not pa.types.is_integer(column.type):
        return np.full(len(column), -1, np.int64)
    sizes: npt.NDArray[np.int64] = column.fill_null(-1).to_numpy().astype(np.int64)
    return sizes


def _ranges(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending indices as ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)
