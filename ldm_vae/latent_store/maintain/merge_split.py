"""Copying rows of finished stores into a new one: merge, compact and split are choices of rows.

Rows that an update has taken out are gone, the others are dealt anew into units. Every shard is verified before it is
copied: damage must not get a new checksum that says it is sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    read_finished,
)
from ldm_vae.latent_store.format.publication import Group
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.format.rows import tensors_of
from ldm_vae.latent_store.maintain.repack import (
    Integers,
    Samples,
    Tensors,
    image_ordinals,
    repack,
)
from ldm_vae.latent_store.maintain.verify import check_shard
from ldm_vae.latent_store.remote.at_hand import mapped_tensors, rows_of
from ldm_vae.latent_store.storage.places import Place
from ldm_vae.latent_store.write.updates import (
    StoredImages,
    digests,
    said_by_rows,
    shortened,
)


@dataclass(frozen=True)
class StoredPiece:
    """Rows of one shard that are to be copied, ascending; their keys, in the same order."""

    store: Place
    manifest: Manifest
    shard: ShardRecord
    rows: Integers
    keys: list[str]

    @property
    def group(self) -> Group:
        """Facts that the rows share (`publication.Group`)."""
        return self.shard.group

    @property
    def shape(self) -> tuple[int, ...]:
        """Latent shape c, h, w."""
        return self.shard.shape

    def check(self) -> None:
        """Raises WorkError for the first thing that is wrong with the shard; of a URL a download does, file by file."""
        if isinstance(self.store, str):
            return
        for problem in check_shard(self.store, self.manifest, self.shard):
            raise WorkError(f"store {self.store}: {problem.file} {problem.what}; `ldm-vae store repair` comes first")

    def read(self, positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        """Mapped tensors and the columns, a few rows at a time."""
        mapped = mapped_tensors(self.store, self.manifest.identity, self.shard)
        table = rows_of(self.store, self.shard)
        names = tensors_of(self.manifest.identity)
        step = chunk_rows(self.shape)
        for begin in range(0, len(positions), step):
            some = self.rows[positions[begin : begin + step]]
            yield {name: mapped[name][some] for name in names}, table.take(some).to_pylist()


def pieces(store: Place, manifest: Manifest) -> Iterator[StoredPiece]:
    """All live rows of a store, in the order of the samples, one piece per shard."""
    for shard in manifest.shards:
        live = shard.live_rows
        if len(live):
            table = rows_of(store, shard, ["key"], shard.rows)
            yield StoredPiece(store, manifest, shard, live, table.column("key").take(live).to_pylist())


def chosen(piece: StoredPiece, keep: npt.NDArray[np.bool_]) -> StoredPiece:
    """The rows of a piece that `keep` marks."""
    keys = [key for key, kept in zip(piece.keys, keep, strict=True) if kept]
    return StoredPiece(piece.store, piece.manifest, piece.shard, piece.rows[keep], keys)


def merge(stores: Sequence[Place], out: Place) -> Manifest:
    """Merge stores into one, or rewrite a single one without its removed rows. An image that several hold is taken
    once.

    Raises:
        UsageError: the stores are of different identities; a key names different images in two of them, or an image has
            different columns; OUT exists.
        WorkError: a store is damaged, or OUT cannot be written.
    """
    manifests = [read_finished(store) for store in stores]
    for store, manifest in zip(stores[1:], manifests[1:], strict=True):
        check_same_identity(stores[0], manifests[0].identity, store, manifest.identity)
    parts: list[StoredPiece] = []
    earlier: list[StoredImages] = []
    for number, (store, manifest) in enumerate(zip(stores, manifests, strict=True), 1):
        parts += [new for piece in pieces(store, manifest) if len((new := _unseen(piece, earlier)).rows)]
        if number < len(stores):
            # each store is compared with those before it; none comes after the last
            earlier.append(StoredImages(store, manifest))
    quarantine = {entry.key: entry for store in stores for entry in read_quarantine(store)}
    # each once, in order: the rows keep the settings that they were computed with
    settings = tuple(dict.fromkeys(setting for manifest in manifests for setting in manifest.settings))
    return repack(parts, out, manifests[0].model_copy(update={"settings": settings}), list(quarantine.values()))


def check_same_identity(first: Place, one: Identity, second: Place, other: Identity) -> None:
    """Raises UsageError naming what differs between two stores that would become one."""
    before, after = one.model_dump(mode="json"), other.model_dump(mode="json")
    differing = [f"{name} {before[name]} and {after[name]}" for name in before if before[name] != after[name]]
    if differing:
        raise UsageError(f"stores {first} and {second} are of different identities: {'; '.join(differing)}")


def _unseen(piece: StoredPiece, earlier: Sequence[StoredImages]) -> StoredPiece:
    """Drop the rows of images that an earlier store has. Raises UsageError for a key that names another image there."""
    table = rows_of(piece.store, piece.shard, ["image_sha256"])
    images = shortened(table.column("image_sha256").take(piece.rows).to_pylist())
    saying = said_by_rows(piece.store, piece.shard) if earlier else ()
    keep = np.ones(len(piece.rows), dtype=bool)
    for stored in earlier:
        for position, found in enumerate(stored.find(digests(piece.keys))):
            if found.start < found.stop:
                # the earlier store's rows stand, if both are of the same image and say the same of it
                keep[position] = False
                if not images[position]:
                    raise UsageError(
                        f"store {piece.store}: {piece.keys[position]} is in a store before it too, and without "
                        "a checksum nobody can say whether it is the same image; `store split` can leave it out"
                    )
                if stored.images[found.start] != images[position]:
                    raise UsageError(
                        f"store {piece.store}: {piece.keys[position]} is another image there than in a store before "
                        "it; bring both up to date with `encode --update`, or merge without one of them"
                    )
                if stored.said(found.start) != bytes(saying[piece.rows[position]]):
                    raise UsageError(
                        f"store {piece.store}: {piece.keys[position]} has other columns there (its caption, its label) "
                        "than in a store before it; bring both up to date with `encode --update`, or `store split` can "
                        "leave it out"
                    )
    return chosen(piece, keep)


# --- split ------------------------------------------------------------------------------------------------------------


def split(store: Place, out: Path, count: int) -> list[Path]:
    """Split a store into `count` stores OUT/0, OUT/1, ..., each of consecutive whole units.

    Raises:
        UsageError: there are fewer units than parts; OUT exists.
    """
    manifest = read_finished(store)
    everything = list(pieces(store, manifest))
    ordinals = image_ordinals([key for piece in everything for key in piece.keys])
    units = ordinals // manifest.identity.shard_size
    total = int(units.max()) + 1
    if not 1 <= count <= total:
        raise UsageError(f"--parts: expected 1 to {total}, the units of {store}, got {count}")
    # consecutive units, and parts whose numbers of units differ by at most one
    part = units * count // total
    # one name for all parts: they appear together or not at all
    with atomic_io.whole_folder(out) as folder:
        for number in range(count):
            repack(_kept(everything, part == number), folder / str(number), manifest)
    return [out / str(number) for number in range(count)]


def take_samples(store: Place, out: Place, first: int, stop: int) -> Manifest:
    """Write samples [first, stop), as LatentDataset counts them, as a store of their own."""
    manifest = read_finished(store)
    if not 0 <= first < stop <= manifest.samples:
        raise UsageError(f"--rows: expected FIRST:STOP within 0:{manifest.samples}, got {first}:{stop}")
    marks = np.zeros(manifest.samples, dtype=bool)
    marks[first:stop] = True
    return repack(_kept(list(pieces(store, manifest)), marks), out, manifest)


def take_where(store: Place, out: Place, wanted: Sequence[tuple[str, str]]) -> Manifest:
    """Write the samples whose columns have these values as text, as a store of their own; of a list, one of its
    elements."""
    manifest = read_finished(store)
    for name, _ in wanted:
        if name not in manifest.columns:
            raise UsageError(f"--where: the store has no column {name!r}; it has {', '.join(manifest.columns)}")
    parts = []
    for piece in pieces(store, manifest):
        table = rows_of(piece.store, piece.shard).take(piece.rows)
        keep = np.ones(len(piece.rows), dtype=bool)
        for name, value in wanted:
            values = table.column(name).to_pylist() if name in table.column_names else [None] * len(keep)
            keep &= [_has(found, value) for found in values]
        parts.append(chosen(piece, keep))
    return repack([piece for piece in parts if len(piece.rows)], out, manifest)


def _has(found: Any, value: str) -> bool:
    return any(str(one) == value for one in found) if isinstance(found, list) else str(found) == value


def _kept(everything: Sequence[StoredPiece], marks: npt.NDArray[np.bool_]) -> list[StoredPiece]:
    """Pieces of the rows that are marked; `marks` runs over all rows."""
    stops = np.cumsum([len(piece.rows) for piece in everything])
    each = zip(everything, np.split(marks, stops[:-1]), strict=True)
    return [chosen(piece, keep) for piece, keep in each if keep.any()]
