"""Freshness: a store is of the images as they are now, the promise that a finished store is never a stale one.

Keys say which images a store has, not what is in them: a picture is replaced under its name, or the data are a copied
folder with another picture in it. What costs nothing comes first. An image that was seen at its stamp (`sightings`) is
the one that was encoded. One whose size is not that of its row is another. What is left is in doubt (another machine,
a copied or touched file, a store of an older version) and is read: SHA-256 and other columns (caption, label) against
the row. 10^6 files that were seen take as long as 10^6 stat calls.

Legend: n images of a chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ldm_vae.core.errors import UsageError
from ldm_vae.core.progress import Progress
from ldm_vae.data.source import Source
from ldm_vae.data.stamps import Sizes, Stamps, chunks_of, stamps_of
from ldm_vae.latent_store.format import work_units
from ldm_vae.latent_store.format.layout import passed_on
from ldm_vae.latent_store.format.manifest import Manifest, ShardRecord, SourceIdentity
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.format.work_units import (
    BadSample,
    Plan,
    fresh_plan,
    read_plan,
    storable,
)
from ldm_vae.latent_store.storage.places import Place
from ldm_vae.latent_store.write.freshness_cache import Numbers, Sightings
from ldm_vae.latent_store.write.updates import (
    DIGEST,
    Look,
    StoredImages,
    checksums,
    digests,
    shortened,
)

logger = logging.getLogger(__name__)

EVERYTHING = slice(0, None, 1)

Check = Literal["doubt", "contents", "size"]
"""The images that are read: those in doubt, all, or (trusting equal sizes) only those of which no size is known."""


@dataclass
class Findings:
    """Findings of a check: how many images are not those of the store, and the first of them with what is wrong."""

    stale: int = 0
    first: str = ""
    trusted: int = 0
    """Images that were not read, since their size is the same."""
    unreadable: int = 0

    def blame(self, key: str, what: str) -> None:
        """Count one more stale image, and keep what is wrong with the first."""
        self.stale += 1
        self.first = self.first or f"{key} {what}"


def check(
    store: Place, manifest: Manifest, wanted: SourceIdentity, source: Source, how: Check, num_workers: int, share: slice
) -> None:
    """Compare what a store keeps of an earlier call with the images as they are now.

    Args:
        share: of the units, or of the images of a finished store, that are looked at.

    Raises:
        UsageError: an image is not the one that was encoded.
    """
    held = _held(store, manifest, wanted, source, share)
    found = Findings() if held is None else held.compare(how, num_workers)
    if found.unreadable:
        logger.warning("%d images cannot be read now and keep the latents that they have", found.unreadable)
    if found.trusted:
        logger.warning("%d images were not read: their size is what it was; --check doubt reads them", found.trusted)
    if found.stale:
        raise UsageError(
            f"OUT {store}: {found.stale:,} of the {wanted.samples:,} images of DATA are not what they were when they "
            f"were encoded, the first: {found.first}; --update takes them up"
        )


def is_stale(store: Place, manifest: Manifest, wanted: SourceIdentity, source: Source, num_workers: int) -> bool:
    """True when something that a stopped update has done, or meant to keep, is of other images than there are now."""
    held = _held(store, manifest, wanted, source)
    return held is not None and held.compare("doubt", num_workers).stale > 0


@dataclass
class _Held:
    """The source's part in the store: rows and quarantined images, of the images in `pieces`; `whole`: of every
    image, or some are to come."""

    store: Place
    source: Source
    stored: StoredImages | None
    bad: dict[str, BadSample]
    pieces: Sequence[Sequence[int]]
    whole: bool
    named: bool = True
    """Whether the columns of the source are called as those of the store."""
    found: Findings = field(default_factory=Findings)

    def compare(self, how: Check, num_workers: int) -> Findings:
        # first pass, by stat alone; what it cannot decide is collected
        sightings = Sightings(self.store)
        seen = sightings.read()
        doubtful = [np.empty(0, np.int64)]
        known = [np.empty(0, np.uint64)]
        total = sum(map(len, self.pieces))
        with Progress(total=total, desc="check", unit="img", leave=False) as bar:
            chunks = (chunk for piece in self.pieces for chunk in chunks_of(piece))
            for indices, stamps, sizes in stamps_of(self.source, chunks):
                doubt, these = self._look(indices, stamps, sizes, seen, how)
                known.append(these)
                doubtful.append(np.asarray(indices, dtype=np.int64)[doubt])
                bar.update(len(indices))
        in_doubt = np.concatenate(doubtful)
        # refused already: to read the rest would take time and change nothing
        if self.found.stale and how != "contents":
            self.found.first += "; what is in doubt was not read" if len(in_doubt) else ""
            return self.found
        known.append(self._read(in_doubt, num_workers))
        # Every image was met and is the one that was encoded: these sightings are all there are, and older ones are
        # dropped (written only where something changed). Otherwise new ones are added.
        if self.whole and not self.found.stale and len(now := np.concatenate(known)):
            if len(np.setxor1d(now, seen)):
                sightings.keep(now)
        else:
            sightings.add(known[-1].tolist())
        return self.found

    def _look(
        self, indices: Sequence[int], stamps: Stamps, sizes: Sizes, seen: Numbers, how: Check
    ) -> tuple[npt.NDArray[np.bool_], Numbers]:
        """Without reading: which of n images are in doubt, and the sightings that stand."""
        keys = [storable(self.source.key(index)) for index in indices]
        rows, images, uniform, had = self._rows(keys)
        for position in np.flatnonzero(~rows).tolist():
            entry = self.bad.get(keys[position])
            if entry is not None:
                images[position] = _first_half(entry.image_sha256)
            elif self.whole:
                self.found.blame(keys[position], "is not in the store")
        there = rows | np.array([key in self.bad for key in keys], dtype=bool)
        # stamp xor checksum, as `sighting` makes them; 0 where the file system gives no stamp
        sighted = np.where(stamps > 0, stamps ^ images, np.uint64(0))
        # seen at this very stamp, with one checksum in all its rows, and the columns named as then: not read
        fresh = (sighted > 0) & (images > 0) & _among(sighted, seen) & uniform & (how != "contents") & self.named
        # another size is another image, which needs no reading
        grown = there & ~fresh & (sizes >= 0) & (had >= 0) & (sizes != had)
        # --check size: an equal size is trusted
        same = there & ~fresh & uniform & (sizes >= 0) & (sizes == had) & (how == "size") & self.named
        for position in np.flatnonzero(grown).tolist():
            self.found.blame(keys[position], f"has {sizes[position]:,} bytes and had {had[position]:,}")
        self.found.trusted += int(same.sum())
        return there & ~fresh & ~grown & ~same, sighted[fresh]

    def _rows(self, keys: Sequence[str]) -> tuple[npt.NDArray[np.bool_], Numbers, npt.NDArray[np.bool_], Sizes]:
        """Look up n keys: whether there are rows, the first 8 bytes of their SHA-256 as a number, whether all rows of a
        key say the same, and how many bytes the image had (-1: unknown)."""
        count = len(keys)
        images, uniform = np.zeros(count, np.uint64), np.ones(count, dtype=bool)
        had = np.full(count, -1, np.int64)
        if self.stored is None:
            return np.zeros(count, dtype=bool), images, uniform, had
        first, stop = self.stored.bounds(digests(keys))
        rows = first < stop
        own = self.stored.images[first[rows]]
        # the first 8 of each row's 16 bytes, big-endian: as `sighting` reads the hexadecimal digits
        images[rows] = np.frombuffer(own.tobytes(), ">u8")[:: DIGEST // 8]
        had[rows] = self.stored.bytes[first[rows]]
        for more in range(1, int((stop - first).max(initial=0))):  # several resolutions
            further = first + more < stop
            uniform[further] &= self.stored.images[first[further] + more] == self.stored.images[first[further]]
        return rows, images, uniform, had

    def _read(self, indices: npt.NDArray[np.int64], num_workers: int) -> Numbers:
        """Compare the contents of images in doubt; the sightings of those that are what they were."""
        if not len(indices):
            return np.empty(0, np.uint64)
        logger.warning("%d images are read and compared: nothing shows that they are as they were", len(indices))
        good: list[int] = []
        with Progress(total=len(indices), desc="compare", unit="img", leave=False) as bar:
            for some, looks in checksums(self.source, indices, num_workers):
                keys = [storable(self.source.key(index)) for index in some]
                rows = [slice(0, 0)] * len(keys) if self.stored is None else self.stored.find(digests(keys))
                for key, own, look in zip(keys, rows, looks, strict=True):
                    if self._agrees(key, own, look) and look.sighting:
                        good.append(look.sighting)
                bar.update(len(some))
        return np.array(good, dtype=np.uint64)

    def _agrees(self, key: str, rows: slice, look: Look) -> bool:
        checksum = look.checksum
        # quarantined then: only its bytes can tell
        if rows.start == rows.stop:
            if checksum == self.bad[key].image_sha256:
                return True
            if checksum is not None:
                self.found.blame(key, "could not be used then, and its bytes have changed")
            return False
        # an unreadable image keeps its latents: a disk that is away for a moment makes no store stale
        if checksum is None:
            self.found.unreadable += 1
            return False
        assert self.stored is not None
        if not (self.stored.images[rows] == shortened([checksum])[0]).all():
            self.found.blame(key, "has changed")
            return False
        if any(self.stored.said(row) != look.said for row in range(rows.start, rows.stop)):
            self.found.blame(key, f"has other columns than then ({', '.join(self.source.columns) or 'now none'})")
            return False
        return True


def _among(numbers: Numbers, ascending: Numbers) -> npt.NDArray[np.bool_]:
    """Mark the `numbers` that are in `ascending`; np.isin would sort both for every chunk."""
    if not len(ascending):
        return np.zeros(len(numbers), dtype=bool)
    found: npt.NDArray[np.bool_] = ascending[np.searchsorted(ascending, numbers) % len(ascending)] == numbers
    return found


def _first_half(checksum: str | None) -> int:
    return int((checksum or "0")[:16], 16)


def _held(
    store: Place, manifest: Manifest, wanted: SourceIdentity, source: Source, share: slice = EVERYTHING
) -> _Held | None:
    """The part that the same command would keep; None when that is nothing, or when it is refused for other reasons."""
    if not manifest.complete:
        # the first encode was stopped: its done units
        return None if manifest.source != wanted else _done(store, manifest, fresh_plan(wanted), (), source, share)
    plan = read_plan(store, manifest.units)
    # an update for this very source was stopped: the rows it keeps, and its done units
    if plan is not None and plan.source == wanted:
        return _done(store, manifest, plan, manifest.shards, source, share)
    if manifest.source != wanted:
        return None
    # finished, for this very source
    pieces, whole = [range(len(source))[share]], share == EVERYTHING
    return _of(store, manifest, manifest.shards, read_quarantine(store), source, pieces, whole=whole)


def _done(
    store: Place, manifest: Manifest, plan: Plan, shards: Sequence[ShardRecord], source: Source, share: slice
) -> _Held | None:
    """The rows that a plan keeps, and the units of it that are done."""
    work = plan.digest(manifest.identity)
    kept = [shard.without(plan.removed.get(shard.name, ())) for shard in shards]
    bad = list(plan.bad)
    pieces: list[Sequence[int]] = []
    units = {unit.number: unit for unit in plan.units(manifest.identity.shard_size)[share]}
    for record in work_units.done_records(store, units.values(), work):
        kept += record.shards
        bad += record.bad
        pieces.append(units[record.unit].indices)
    return _of(store, manifest, kept, bad, source, [range(len(source))[share]] if shards else pieces, whole=False)


def _of(
    store: Place,
    manifest: Manifest,
    shards: Sequence[ShardRecord],
    bad: Sequence[BadSample],
    source: Source,
    pieces: Sequence[Sequence[int]],
    *,
    whole: bool,
) -> _Held | None:
    live = tuple(shard for shard in shards if shard.live)
    if not pieces:
        return None
    rows = StoredImages(store, manifest.model_copy(update={"shards": live}), source.columns) if live else None
    named = rows is None or rows.columns() == {*passed_on(dict.fromkeys(source.columns))}
    return _Held(store, source, rows, {entry.key: entry for entry in bad}, pieces, whole, named)
