"""Verification: every file is read again and compared with the manifest; nothing is changed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ldm_vae.core.errors import WorkError
from ldm_vae.core.file_record import checksum
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.layout import (
    EXTENSIONS,
    MAPPED_ROWS,
    SAFETENSORS_DTYPES,
    SHARDS,
    TENSORS,
    shard_file,
    shard_path,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    place_of,
    read_finished,
)
from ldm_vae.latent_store.format.rows import map_shard, tensors_of


@dataclass(frozen=True)
class Problem:
    """One problem of a store: the file, relative to the store, and what is wrong with it."""

    file: str
    what: str


def verify(store: str | Path) -> list[Problem]:
    """Read every shard again: checksums, rows, columns, finite values. An empty list means that all is well. Of a URL
    every file is downloaded, past the cache.

    Raises:
        UsageError: there is no store, or it is not finished.
        WorkError: the manifest itself is damaged.

    >>> from ldm_vae import load_autoencoder, open_images, verify, write_store
    >>> vae = load_autoencoder("my-vae")
    >>> _ = write_store(vae, open_images("photos", vae), "my-latents", resolution=32)
    >>> verify("my-latents")
    []
    """
    place = place_of(store)
    manifest = read_finished(place)
    bar = Progress(manifest.shards, desc="verify", unit="shards", leave=False)
    problems: list[Problem] = []
    for shard in bar:
        problems += (
            check_shard(place, manifest, shard) if isinstance(place, Path) else _check_at(place, manifest, shard)
        )
    return problems


def check_shard(store: Path, manifest: Manifest, shard: ShardRecord) -> Iterator[Problem]:
    """Yield the problems of one shard."""
    stem = shard_path(store, shard.name)
    sound = True
    for extension in EXTENSIONS:
        file = shard_file(shard.name, extension)
        expected, found = shard.files[extension], checksum(store / file)
        if found != expected:
            sound = False
            if found.bytes < 0:
                yield Problem(file, "is missing or cannot be read")
            elif found.bytes != expected.bytes:
                yield Problem(file, f"has {found.bytes:,} bytes, the manifest says {expected.bytes:,}")
            else:
                yield Problem(file, "its checksum is not the manifest's: bits have changed")
    # bytes that are not the manifest's are one problem, however much inside them is wrong
    if not sound:
        return
    try:
        yield from _check_rows(manifest, shard, stem)
    except WorkError as error:
        yield Problem(shard_file(shard.name), str(error))


def _check_at(url: str, manifest: Manifest, shard: ShardRecord) -> Iterator[Problem]:
    from ldm_vae.core.fsspec_files import download  # fsspec, which a folder has no need of
    from ldm_vae.latent_store.remote.store import file_url

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SHARDS).mkdir()
        problems = []
        for extension in EXTENSIONS:
            file = shard_file(shard.name, extension)
            try:
                download(file_url(url, shard, extension), Path(folder) / file, shard.files[extension])
            except WorkError as error:
                problems.append(Problem(file, str(error)))
        yield from problems or check_shard(Path(folder), manifest, shard)


def _check_rows(manifest: Manifest, shard: ShardRecord, stem: Path) -> Iterator[Problem]:
    table = shards.read_rows(stem, rows=shard.rows)
    # a checksum proves that a file is as it was written, this that both were written from the same rows
    if not _same(table, shards.map_rows(stem, shard.rows)):
        yield Problem(shard_file(shard.name, MAPPED_ROWS), "does not hold the rows of the parquet")
    file = shard_file(shard.name, TENSORS)
    mapped = map_shard(stem.with_name(f"{shard.name}.{TENSORS}"), manifest.identity, shard)
    dtype = SAFETENSORS_DTYPES[manifest.identity.dtype]
    for name in tensors_of(manifest.identity):
        step = chunk_rows(shard.shape)
        for first in range(0, shard.rows, step):
            if not np.isfinite(shards.to_float(mapped[name][first : first + step], dtype)).all():
                yield Problem(file, f"tensor {name} holds NaN or infinity in rows {first} to {first + step}")
                break


def _same(one: pa.Table, other: pa.Table) -> bool:
    """Equal schemas and values; to Arrow no NaN equals another, so tables that differ are compared as text again."""
    return one.equals(other) or (one.schema.equals(other.schema) and str(one.to_pylist()) == str(other.to_pylist()))
