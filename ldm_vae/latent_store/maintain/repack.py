"""Dealing rows into the units of a new store: what merge, split and conversion have in common.

Images are dealt anew into units of `shard_size`, in the order of the samples, and each unit's shards are written as the
encoder writes them. So whole units give the files that they had, wherever their rows come from in between.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ldm_vae import __version__
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.ownership import is_mark
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    PIXELS,
    SAFETENSORS_DTYPES,
    SHARDS,
    UNITS,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    SourceIdentity,
    write_manifest,
)
from ldm_vae.latent_store.format.publication import Group, publish_shard
from ldm_vae.latent_store.format.quarantine import write_quarantine
from ldm_vae.latent_store.format.work_units import BadSample
from ldm_vae.latent_store.storage.claims import own_place
from ldm_vae.latent_store.storage.places import Place, storage_at
from ldm_vae.latent_store.write.finalize import merged_statistics
from ldm_vae.latent_store.write.updates import digests

Integers = npt.NDArray[np.int64]
Tensors = dict[str, npt.NDArray[Any]]  # by name, [n, ...] in storage dtype
Samples = list[dict[str, Any]]  # the columns of n rows


class Piece(Protocol):
    """Rows that share a latent shape and can be read: of one shard of a store, of one file of another format."""

    @property
    def keys(self) -> Sequence[str]:
        """Keys of all its rows, in order."""

    @property
    def group(self) -> Group:
        """Resolution, height and width of the crops."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Latent shape c, h, w."""

    def check(self) -> None:
        """Raises WorkError if it is damaged: damage must not get a new checksum that says it is sound."""

    def read(self, positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        """The rows at these positions, ascending, in parts that fit into memory."""


def repack(parts: Sequence[Piece], out: Place, head: Manifest, quarantine: Sequence[BadSample] = ()) -> Manifest:
    """Write a new store of these rows; it has its name only when it is whole.

    Args:
        head: its identity, settings and what is recorded.
        quarantine: entries to carry over; those of an image that is among the rows are left out.

    Raises:
        UsageError: there are no rows, or OUT exists.
        WorkError: a piece is damaged, or OUT cannot be written.
    """
    if not parts:
        raise UsageError(f"OUT {out}: no samples are left to put into it")
    if isinstance(out, str):
        with own_place(out, "OUT"):
            _check_free(out)
            return _fill(out, parts, head, quarantine)
    with atomic_io.whole_folder(out) as folder:
        for name in (SHARDS, UNITS):
            (folder / name).mkdir()
        return _fill(folder, parts, head, quarantine)


def _check_free(url: str) -> None:
    """Raises UsageError where something lies, but for shards that a stopped call of this kind has left."""
    storage = storage_at(url)
    taken = [name for name in storage.names() if name != SHARDS and not is_mark(Path(name))]
    taken += [name for name in storage.names(SHARDS) if re.match(r"shards/[0-9]{8}[-.]", name) is None]
    if taken:
        raise UsageError(f"OUT {url}: holds something already ({taken[0]}); choose a new place")


def _fill(folder: Place, parts: Sequence[Piece], head: Manifest, quarantine: Sequence[BadSample]) -> Manifest:
    keys = [key for piece in parts for key in piece.keys]
    ordinals = image_ordinals(keys)
    unit_of = ordinals // head.identity.shard_size
    images = int(ordinals.max()) + 1
    lengths = [len(piece.keys) for piece in parts]
    # of every row: its piece, and its place in the piece
    owner = np.repeat(np.arange(len(parts)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    # all are verified before the first byte is written
    for piece in Progress(parts, desc="verify", unit="shards", leave=False):
        piece.check()
    entries: list[ShardRecord] = []
    columns: dict[str, str] = {}
    # stable: within a unit rows keep their order
    order = np.argsort(unit_of, kind="stable")
    slices = np.split(order, np.flatnonzero(np.diff(unit_of[order])) + 1)
    for number, own in enumerate(Progress(slices, desc="write", unit="units", leave=False)):
        groups: dict[Group, list[tuple[Piece, Integers]]] = {}
        for index in np.unique(owner[own]).tolist():
            groups.setdefault(parts[index].group, []).append((parts[index], position[own[owner[own] == index]]))
        # as the encoder's pipeline orders a unit's shards, so that whole units give the files that they had
        for group, taken in sorted(groups.items(), key=lambda item: item[0]):
            record, types = _write_shard(folder, head.identity, number, group, taken)
            entries.append(record)
            columns |= {name: kind for name, kind in types.items() if columns.get(name, "null") == "null"}
    unseen = {entry.key for entry in quarantine} - set(keys)
    bad = [entry for entry in quarantine if entry.key in unseen]
    # there is no source any more: bad images are counted on behind the good ones
    bad = [entry.model_copy(update={"index": images + place}) for place, entry in enumerate(bad)]
    write_quarantine(folder, bad)
    _, heads = np.unique(ordinals, return_index=True)
    manifest = Manifest(
        complete=True,
        identity=head.identity,
        source=_source([*(keys[first] for first in heads.tolist()), *(entry.key for entry in bad)]),
        recorded=head.recorded.model_copy(update={"tool": __version__}),
        settings=head.settings,
        units=len(slices),
        samples=len(keys),
        quarantined=len(bad),
        columns=columns,
        statistics=merged_statistics(folder, head, entries).to_json(),
        shards=tuple(entries),
    )
    write_manifest(folder, manifest)
    return manifest


def _source(keys: Sequence[str]) -> SourceIdentity:
    digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode())
    return SourceIdentity(samples=len(keys), keys=digest.hexdigest())


def image_ordinals(keys: Sequence[str]) -> Integers:
    """Ordinal of the image that each row shows, counted in the order of first appearance."""
    _, first, inverse = np.unique(digests(keys), return_index=True, return_inverse=True)
    # np.unique sorts by digest; rank turns that into the order of first appearance
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _write_shard(
    folder: Place, identity: Identity, unit: int, group: Group, taken: Sequence[tuple[Piece, Integers]]
) -> tuple[ShardRecord, dict[str, str]]:
    """One shard of a unit, of rows that come from any number of pieces."""
    storage, samples = storage_at(folder), Samples()
    spool: shards.Spool | None = None
    try:
        for piece, own in taken:
            for tensors, some in piece.read(own):
                if spool is None:
                    spool = shards.Spool(storage.scratch, [_spec(identity, *item) for item in tensors.items()])
                spool.append(tensors)
                samples += some
        assert spool is not None
        return publish_shard(storage, identity, unit, group, spool, samples)
    finally:
        if spool is not None:
            spool.close()


def _spec(identity: Identity, tensor: str, values: npt.NDArray[Any]) -> shards.TensorSpec:
    dtype = "U8" if tensor.split(".")[0] == PIXELS else SAFETENSORS_DTYPES[identity.dtype]
    return shards.TensorSpec(tensor, dtype, values.shape[1:])
