"""Copying rows of finished stores into a new one: merge, compact and split are choices of rows.

Images are dealt anew into units of `shard_size`, in the order of the samples, and each unit's shards are written as the
encoder writes them. So whole units give the files that they had, and rows that an update has taken out are gone. Every
shard is verified before it is copied: damage must not get a new checksum that says it is sound.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm_vae import __version__, publish
from ldm_vae.errors import UsageError, WorkError
from ldm_vae.latent_store import rows, shards
from ldm_vae.latent_store.finishing import merged_statistics, read_quarantine
from ldm_vae.latent_store.layout import PIXELS, QUARANTINE, SAFETENSORS_DTYPES, SHARDS, STATISTICS, TENSORS, UNITS
from ldm_vae.latent_store.manifest import (
    Identity,
    Manifest,
    ShardRecord,
    SourceIdentity,
    read_manifest,
    write_manifest,
)
from ldm_vae.latent_store.units import BadSample
from ldm_vae.latent_store.updating import StoredImages, digests, shortened
from ldm_vae.latent_store.verifying import check_shard

Integers = npt.NDArray[np.int64]
Group = tuple[int, int, int]  # resolution, height, width


@dataclass(frozen=True)
class Piece:
    """Rows of one shard that are to be copied, ascending; their keys, in the same order."""

    store: Path
    manifest: Manifest
    shard: ShardRecord
    rows: Integers
    keys: list[str]


def finished(store: Path) -> Manifest:
    """The manifest of a store that can be copied. Raises UsageError when there is none or it is not finished."""
    manifest = read_manifest(store)
    if not manifest.complete:
        raise UsageError(f"store {store}: not finished; run the `ldm-vae encode` command that began it again")
    return manifest


def pieces(store: Path, manifest: Manifest) -> Iterator[Piece]:
    """Everything that is live in a store, in the order of the samples."""
    for shard in manifest.shards:
        live = np.setdiff1d(np.arange(shard.rows), shard.removed)
        if len(live):
            keys = shards.read_rows(store / SHARDS / shard.name, ["key"]).column("key").take(live).to_pylist()
            yield Piece(store, manifest, shard, live, keys)


def chosen(piece: Piece, keep: npt.NDArray[np.bool_]) -> Piece:
    """The rows of a piece that `keep` marks."""
    keys = [key for key, kept in zip(piece.keys, keep, strict=True) if kept]
    return Piece(piece.store, piece.manifest, piece.shard, piece.rows[keep], keys)


def merge(stores: Sequence[Path], out: Path) -> Manifest:
    """One store of several, or of one that is to lose its removed rows. An image that several hold is taken once.

    Raises:
        UsageError: the stores are of different identities; a key names different images in two of them; OUT exists.
        WorkError: a store is damaged, or OUT cannot be written.
    """
    manifests = [finished(store) for store in stores]
    for store, manifest in zip(stores[1:], manifests[1:], strict=True):
        check_same_identity(stores[0], manifests[0].identity, store, manifest.identity)
    parts: list[Piece] = []
    earlier: list[StoredImages] = []
    for store, manifest in zip(stores, manifests, strict=True):
        parts += [new for piece in pieces(store, manifest) if len((new := _unseen(piece, earlier)).rows)]
        if store != stores[-1]:
            earlier.append(StoredImages(store, manifest))
    quarantine = {entry.key: entry for store in stores for entry in read_quarantine(store)}
    return copy(parts, out, manifests, list(quarantine.values()))


def check_same_identity(first: Path, one: Identity, second: Path, other: Identity) -> None:
    """Raises UsageError naming what differs between two stores that would become one."""
    before, after = one.model_dump(mode="json"), other.model_dump(mode="json")
    differing = [f"{name} {before[name]} and {after[name]}" for name in before if before[name] != after[name]]
    if differing:
        raise UsageError(f"stores {first} and {second} are of different identities: {'; '.join(differing)}")


def _unseen(piece: Piece, earlier: Sequence[StoredImages]) -> Piece:
    """Without the images that an earlier store has. Raises UsageError for a key that names another image there."""
    table = shards.read_rows(piece.store / SHARDS / piece.shard.name, ["image_sha256"])
    images = shortened(table.column("image_sha256").take(piece.rows).to_pylist())
    keep = np.ones(len(piece.rows), dtype=bool)
    for stored in earlier:
        for position, found in enumerate(stored.find(digests(piece.keys))):
            if found.start < found.stop:
                keep[position] = False
                if stored.images[found.start] != images[position]:
                    raise UsageError(
                        f"store {piece.store}: {piece.keys[position]} is another image there than in a store before "
                        "it; bring both up to date with `encode --update`, or merge without one of them"
                    )
    return chosen(piece, keep)


def copy(
    parts: Sequence[Piece], out: Path, manifests: Sequence[Manifest], quarantine: Sequence[BadSample] = ()
) -> Manifest:
    """Write a new store of these rows; it has its name only when it is whole.

    Args:
        manifests: of the stores that the rows come from, all of one identity; what is recorded is the first one's.
        quarantine: entries to carry over; those of an image that is among the rows are left out.

    Raises:
        UsageError: there are no rows, or OUT exists.
        WorkError: a shard is damaged, or OUT cannot be written.
    """
    if not parts:
        raise UsageError(f"OUT {out}: no samples are left to put into it")
    if out.exists():
        raise UsageError(f"OUT {out}: exists already; choose a new folder")
    try:
        folder = publish.beside(out)
    except OSError as error:
        raise publish.explained(error, out) from error
    try:
        for name in (SHARDS, UNITS):
            (folder / name).mkdir()
        manifest = _fill(folder, parts, manifests, quarantine)
        publish.put(folder, out)
    except OSError as error:
        raise publish.explained(error, out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _fill(
    folder: Path, parts: Sequence[Piece], manifests: Sequence[Manifest], quarantine: Sequence[BadSample]
) -> Manifest:
    first = manifests[0]
    keys = [key for piece in parts for key in piece.keys]
    ordinals = _ordinals(keys)
    unit_of = ordinals // first.identity.shard_size
    images = int(ordinals.max()) + 1
    owner = np.repeat(np.arange(len(parts)), [len(piece.rows) for piece in parts])
    row = np.concatenate([piece.rows for piece in parts])
    for piece in tqdm(parts, desc="verify", unit="shards", disable=None, leave=False):
        for problem in check_shard(piece.store, piece.manifest, piece.shard):
            raise WorkError(f"store {piece.store}: {problem.file} {problem.what}; `ldm-vae store repair` comes first")
    entries: list[ShardRecord] = []
    columns: dict[str, str] = {}
    order = np.argsort(unit_of, kind="stable")
    slices = np.split(order, np.flatnonzero(np.diff(unit_of[order])) + 1)
    for number, own in enumerate(tqdm(slices, desc="copy", unit="units", disable=None, leave=False)):
        groups: dict[Group, list[tuple[Piece, Integers]]] = {}
        for index in np.unique(owner[own]).tolist():
            shard = parts[index].shard
            group = (shard.resolution, *shard.size)
            groups.setdefault(group, []).append((parts[index], row[own[owner[own] == index]]))
        for group, taken in sorted(groups.items()):
            record, types = _write_shard(folder, first.identity, number, group, taken)
            entries.append(record)
            columns |= {name: kind for name, kind in types.items() if columns.get(name, "null") == "null"}
    unseen = {entry.key for entry in quarantine} - set(keys)
    bad = [entry for entry in quarantine if entry.key in unseen]
    bad = [entry.model_copy(update={"index": images + position}) for position, entry in enumerate(bad)]
    lines = [json.dumps(entry.model_dump(mode="json"), ensure_ascii=False) + "\n" for entry in bad]
    publish.replace(folder / QUARANTINE, publish.data("".join(lines).encode()))
    _, heads = np.unique(ordinals, return_index=True)
    manifest = Manifest(
        complete=True,
        identity=first.identity,
        source=_source([*(keys[head] for head in heads.tolist()), *(entry.key for entry in bad)]),
        recorded=first.recorded.model_copy(update={"tool": __version__}),
        settings=tuple(dict.fromkeys(setting for manifest in manifests for setting in manifest.settings)),
        units=len(slices),
        samples=len(row),
        quarantined=len(bad),
        columns=columns,
        statistics=merged_statistics(folder, first, entries).to_json(),
        shards=tuple(entries),
    )
    write_manifest(folder, manifest)
    return manifest


def _source(keys: Sequence[str]) -> SourceIdentity:
    digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode())
    return SourceIdentity(samples=len(keys), keys=digest.hexdigest())


def _ordinals(keys: Sequence[str]) -> Integers:
    """Which image each row shows, counted in the order in which they first come."""
    _, first, inverse = np.unique(digests(keys), return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _write_shard(
    folder: Path, identity: Identity, unit: int, group: Group, taken: Sequence[tuple[Piece, Integers]]
) -> tuple[ShardRecord, dict[str, str]]:
    """One shard of a unit; the same rows give the bytes that the encoder's writer gives."""
    resolution, height, width = group
    one_group = len(identity.resolution) == 1 and identity.bucket_step is None
    name = f"{unit:08d}" if one_group else f"{unit:08d}-{resolution}-{height}x{width}"
    samples: list[dict[str, Any]] = []
    spool: shards.Spool | None = None
    try:
        for piece, own in taken:
            mapped = shards.map_tensors(piece.store / SHARDS / f"{piece.shard.name}.{TENSORS}")
            names = [tensor for tensor in mapped if tensor != STATISTICS]
            if spool is None:
                spool = shards.Spool(folder / SHARDS, [_spec(identity, tensor, mapped[tensor]) for tensor in names])
            for begin in range(0, len(own), shards.CHUNK_ROWS):
                some = own[begin : begin + shards.CHUNK_ROWS]
                spool.append({tensor: mapped[tensor][some] for tensor in names})
            samples += shards.read_rows(piece.store / SHARDS / piece.shard.name).take(own).to_pylist()
        assert spool is not None
        table = shards.to_table(samples)
        sums = rows.statistics(identity, spool.read, [sample["key"] for sample in samples])
        metadata = {"encoder": identity.encoder, "unit": str(unit)}
        stem = folder / SHARDS / name
        files = {TENSORS: shards.write_tensors(stem.with_name(f"{name}.{TENSORS}"), spool, sums, metadata)}
        files |= shards.write_rows(stem, table)
        shape = taken[0][0].shard.shape
    finally:
        if spool is not None:
            spool.close()
    record = ShardRecord(
        name=name,
        unit=unit,
        rows=len(samples),
        shape=shape,
        resolution=resolution,
        size=(height, width),
        files=files,
    )
    return record, {field.name: str(field.type) for field in table.schema}


def _spec(identity: Identity, tensor: str, values: npt.NDArray[Any]) -> shards.TensorSpec:
    dtype = "U8" if tensor.split(".")[0] == PIXELS else SAFETENSORS_DTYPES[identity.dtype]
    return shards.TensorSpec(tensor, dtype, values.shape[1:])


# --- split ------------------------------------------------------------------------------------------------------------


def split(store: Path, out: Path, count: int) -> list[Path]:
    """OUT/0, OUT/1, ...: the images of a store in `count` stores of consecutive whole units.

    Raises:
        UsageError: there are fewer units than parts; OUT exists.
    """
    manifest = finished(store)
    everything = list(pieces(store, manifest))
    ordinals = _ordinals([key for piece in everything for key in piece.keys])
    units = ordinals // manifest.identity.shard_size
    total = int(units.max()) + 1
    if not 1 <= count <= total:
        raise UsageError(f"--parts: expected 1 to {total}, the units of {store}, got {count}")
    if out.exists():
        raise UsageError(f"OUT {out}: exists already; choose a new folder")
    part = units * count // total
    folder = publish.beside(out)
    try:
        for number in range(count):
            copy(_kept(everything, part == number), folder / str(number), [manifest])
        publish.put(folder, out)
    except OSError as error:
        raise publish.explained(error, out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [out / str(number) for number in range(count)]


def take_samples(store: Path, out: Path, first: int, stop: int) -> Manifest:
    """Samples [first, stop), as LatentDataset counts them, as a store of their own."""
    manifest = finished(store)
    if not 0 <= first < stop <= manifest.samples:
        raise UsageError(f"--rows: expected FIRST:STOP within 0:{manifest.samples}, got {first}:{stop}")
    marks = np.zeros(manifest.samples, dtype=bool)
    marks[first:stop] = True
    return copy(_kept(list(pieces(store, manifest)), marks), out, [manifest])


def take_where(store: Path, out: Path, wanted: Sequence[tuple[str, str]]) -> Manifest:
    """The samples whose columns have these values as text; of a list, one of its elements."""
    manifest = finished(store)
    for name, _ in wanted:
        if name not in manifest.columns:
            raise UsageError(f"--where: the store has no column {name!r}; it has {', '.join(manifest.columns)}")
    parts = []
    for piece in pieces(store, manifest):
        table = shards.read_rows(piece.store / SHARDS / piece.shard.name).take(piece.rows)
        keep = np.ones(len(piece.rows), dtype=bool)
        for name, value in wanted:
            values = table.column(name).to_pylist() if name in table.column_names else [None] * len(keep)
            keep &= [_has(found, value) for found in values]
        parts.append(chosen(piece, keep))
    return copy([piece for piece in parts if len(piece.rows)], out, [manifest])


def _has(found: Any, value: str) -> bool:
    return any(str(one) == value for one in found) if isinstance(found, list) else str(found) == value


def _kept(everything: Sequence[Piece], marks: npt.NDArray[np.bool_]) -> list[Piece]:
    """Pieces of the rows that are marked; `marks` runs over all rows."""
    stops = np.cumsum([len(piece.rows) for piece in everything])
    each = zip(everything, np.split(marks, stops[:-1]), strict=True)
    return [chosen(piece, keep) for piece, keep in each if keep.any()]
