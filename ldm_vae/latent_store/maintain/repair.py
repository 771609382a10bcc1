"""Repair: only what is damaged is made again, from what is left or from the images.

Lost rows come from their copy (.parquet and .arrow hold the same). Lost tensors are encoded again, unit by unit; at
equal settings the new bytes are the old ones. Samples whose image has gone or changed since leave the store.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae.core.errors import WorkError
from ldm_vae.core.file_record import checksum
from ldm_vae.core.ownership import Ownership, own
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import preprocessing_identity
from ldm_vae.latent_store.format import shards, work_units
from ldm_vae.latent_store.format.layout import (
    EXTENSIONS,
    MAPPED_ROWS,
    ROWS,
    SHARDS,
    UNITS,
    shard_file,
    shard_path,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    read_finished,
    read_manifest,
    write_manifest,
)
from ldm_vae.latent_store.format.work_units import Unit, UnitRecord
from ldm_vae.latent_store.maintain.provenance import indices_of
from ldm_vae.latent_store.storage.objects import LocalFolder
from ldm_vae.latent_store.write import sample_stream
from ldm_vae.latent_store.write.crops import cutting_of
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.finalize import merged_statistics
from ldm_vae.latent_store.write.pipeline import Pipeline

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Repaired:
    """Result of a repair: files copied from their twin, units encoded again, keys that are no longer in the store."""

    copied: tuple[str, ...] = ()
    encoded_units: tuple[int, ...] = ()
    lost: tuple[str, ...] = ()


def repair(
    store: Path,
    *,
    vae: Callable[[], Any],
    source: Callable[[], Source],
    num_workers: int = 0,
    encode_threads: int = 1,
    device: torch.device | str = "cpu",
) -> Repaired:
    """Make a store sound again. `vae` and `source` are asked for only when something has to be encoded again.

    Raises:
        UsageError: there is no store, it is not finished, or another launch is at work in it; VAE or images are needed
            and not found.
        WorkError: it cannot be written.
    """
    read_manifest(store)  # without a store there is nothing to own
    with own(store, "STORE") as owner:
        return _repair(store, owner, vae, source, num_workers, encode_threads, device)


def _repair(
    store: Path,
    owner: Ownership,
    vae: Callable[[], Any],
    source: Callable[[], Source],
    num_workers: int,
    threads: int,
    device: torch.device | str,
) -> Repaired:
    manifest = read_finished(store)
    # safe only as the owner: nobody else has a temporary file here
    LocalFolder(store).tidy(SHARDS, UNITS)
    damaged = {shard.name: _damaged(store, shard) for shard in manifest.shards}
    # rows first: what can be copied needs neither VAE nor images, and no unit is encoded for it
    copied = [file for shard in manifest.shards for file in _copy_rows(store, shard, damaged[shard.name])]
    numbers = sorted({shard.unit for shard in manifest.shards if damaged[shard.name]})
    if not numbers:
        return Repaired(copied=tuple(copied))
    lost = _encode_again(store, manifest, numbers, owner, vae(), source(), num_workers, threads, device)
    return Repaired(tuple(copied), tuple(numbers), tuple(lost))


def _damaged(store: Path, shard: ShardRecord) -> set[str]:
    """Extensions of the files that are not what the manifest says."""
    return {
        extension
        for extension in EXTENSIONS
        if checksum(shard_path(store, shard.name, extension)) != shard.files[extension]
    }


def _copy_rows(store: Path, shard: ShardRecord, damaged: set[str]) -> list[str]:
    """Write the one of .parquet and .arrow that is damaged from the other; what is repaired leaves `damaged`."""
    stem = shard_path(store, shard.name)
    if len(broken := damaged & {ROWS, MAPPED_ROWS}) != 1:
        return []
    (extension,) = broken
    # the twin is whole: its checksum was the manifest's
    table = shards.map_rows(stem) if extension == ROWS else shards.read_rows(stem)
    write = shards.write_parquet if extension == ROWS else shards.write_mapped_rows
    written = write(LocalFolder(store), shard_file(shard.name), table)
    if written != shard.files[extension]:  # another version of pyarrow: sound, and not those bytes
        return []
    damaged.discard(extension)
    return [shard_file(shard.name, extension)]


def _encode_again(
    store: Path,
    manifest: Manifest,
    numbers: Sequence[int],
    owner: Ownership,
    vae: Any,
    source: Source,
    num_workers: int,
    threads: int,
    device: torch.device | str,
) -> list[str]:
    """Encode units again and put their new shards into the manifest; the keys that were lost."""
    identity = manifest.identity
    if (now := preprocessing_identity(source.decoding)) != identity.preprocessing:
        raise WorkError(
            f"store {store}: its images were preprocessed by {identity.preprocessing!r}, this program does it by "
            f"{now!r}: {len(numbers)} unit(s) cannot be made again; encode into a new folder"
        )
    old = {number: _old_rows(store, manifest, number) for number in numbers}
    whole = work_units.fresh_plan(work_units.source_identity(source))
    places = indices_of(source, {row["key"] for rows in old.values() for row in rows or ()})
    slices = {unit.number: unit for unit in whole.units(identity.shard_size)}
    # Two kinds of units. A slice of the source as it is (the first encode's record is still valid) is encoded as it
    # was, so equal settings give equal bytes. Any other, of an update or a merge, is put together by the keys of its
    # rows under a digest of its own.
    as_it_was, by_key = whole.digest(identity), hashlib.sha256(f"repair {manifest.units}".encode()).hexdigest()
    jobs: dict[str, list[Unit]] = {as_it_was: [], by_key: []}
    batch_size = manifest.batch_size
    for number in numbers:
        rows, record = old[number], work_units.read_record(store, number, as_it_was)
        if record is not None:  # the source has the keys that it had then: the unit is the slice that it was
            jobs[as_it_was].append(slices[number])
            # byte identity needs the batch shape that the unit had, perhaps halved since (out of memory)
            batch_size = record.settings.batch_size
        elif rows is not None:
            known = list(dict.fromkeys(places[row["key"]] for row in rows if row["key"] in places))  # in their order
            jobs[by_key] += [Unit(number, known)] if known else []
        else:
            logger.warning("unit %d: nothing says any more which images it held; `encode --update` adds them", number)
    encoder = Encoder(vae, identity, batch_size=batch_size, device=device)
    entries = [shard for shard in manifest.shards if shard.unit not in numbers]
    # images that the source no longer has
    lost = [row["key"] for rows in old.values() for row in rows or () if row["key"] not in places]
    for work, todo in jobs.items():
        stream = sample_stream.samples(
            source, manifest.recorded.data, cutting_of(identity, vae), todo, batch_size, num_workers
        )
        pipeline = Pipeline(store, encoder, work, owner, threads=threads, show=True)
        pipeline.run(stream, sum(len(unit.indices) for unit in todo))
        for unit in todo:
            record = work_units.read_record(store, unit.number, work)
            assert record is not None
            entries += _entries(store, record, old[unit.number], lost)
    # the manifest lists shards by unit; those encoded again were appended
    entries.sort(key=lambda shard: (shard.unit, shard.name))
    if not entries:
        raise WorkError(f"store {store}: nothing of it can be repaired; encode into a new folder")
    # encoding takes long: OUT may have been taken over meanwhile
    owner.check()
    write_manifest(
        store,
        manifest.model_copy(
            update={
                "shards": tuple(entries),
                "samples": sum(shard.live for shard in entries),
                "statistics": merged_statistics(store, manifest, entries).to_json(),
            }
        ),
    )
    return sorted(set(lost))


def _old_rows(store: Path, manifest: Manifest, number: int) -> list[Row] | None:
    """The live rows of a unit as far as they can be read; None when those of a shard cannot."""
    found: list[Row] = []
    for shard in manifest.shards:
        if shard.unit == number:
            try:
                table = shards.read_rows(shard_path(store, shard.name))
            except WorkError:
                try:
                    table = shards.map_rows(shard_path(store, shard.name))
                except WorkError:
                    return None
            found += table.select(["key", "image_sha256", "resolution"]).take(shard.live_rows).to_pylist()
    return found


def _entries(store: Path, record: UnitRecord, old: list[Row] | None, lost: list[str]) -> list[ShardRecord]:
    """The unit's new shards without the rows that were not live before, or whose image is another one now."""
    if old is None:
        return list(record.shards)
    before = {(row["key"], row["resolution"]): row["image_sha256"] for row in old}
    entries = []
    for shard in record.shards:
        table = shards.read_rows(shard_path(store, shard.name), ["key", "image_sha256", "resolution"])
        removed = []
        for position, row in enumerate(table.to_pylist()):
            expected = before.get((row["key"], row["resolution"]))
            # not live before (an update took it out: it stays out), or another image now (lost)
            if expected != row["image_sha256"]:
                removed.append(position)
                if expected is not None:
                    lost.append(row["key"])
        entries.append(shard.model_copy(update={"removed": tuple(removed)}))
    return entries
