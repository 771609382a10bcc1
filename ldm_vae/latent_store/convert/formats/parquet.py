"""Parquet that `datasets.load_dataset` reads: one file per shard, tensors as Array2D to Array4D beside the columns.

    load_dataset("parquet", data_files="OUT/*.parquet")[...].with_format("torch")["mean"]    # [c, h, w]

Identity and quarantine stand in the files' own metadata (keys `ldm_vae` and, in the first, `ldm_vae_quarantine`): a
file of another kind beside them would be taken for data. Latents of several shapes lie in a folder for each shape.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.core.validation import why_unreadable
from ldm_vae.latent_store.convert.formats import (
    Found,
    Options,
    Sketch,
    found,
    is_tensor,
    stored_name,
)
from ldm_vae.latent_store.convert.import_rows import Claim, group_of
from ldm_vae.latent_store.convert.sidecar import (
    Carried,
    as_numbers,
    parse_carried,
)
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.layout import ROWS
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.format.rows import tensors_of
from ldm_vae.latent_store.maintain.merge_split import StoredPiece
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors
from ldm_vae.latent_store.remote.at_hand import opened

CLIPS = True
CARRIED, QUARANTINE = b"ldm_vae", b"ldm_vae_quarantine"
MOST_BYTES = 1 << 33  # of one row group, unpacked


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that parquet cannot hold, one phrase each."""
    lost = ["checksums and memory-mapped reading"]
    if manifest.identity.dtype == "bf16":
        lost.append("bf16: its values are written as float32, which holds them exactly")
    if len({shard.shape for shard in manifest.shards}) > 1:
        lost.append("several latent shapes in one table: each has a folder, to be loaded by itself")
    return lost


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """Write FOLDER/NAME.parquet, or FOLDER/SHAPE/NAME.parquet."""
    identity = manifest.identity
    # one schema for all files: `load_dataset` refuses files whose columns differ
    types = _common_types(pieces)
    if taken := set(types) & set(tensors_of(identity)):
        raise UsageError(f"--to: the column {min(taken)!r} has the name of a tensor, and parquet has one name for both")
    several = len({piece.group for piece in pieces}) > 1
    bare = manifest.model_copy(update={"shards": ()})
    metadata = {CARRIED: bare.model_dump_json().encode()}
    first = {
        QUARANTINE: json.dumps([entry.model_dump(mode="json") for entry in read_quarantine(pieces[0].store)]).encode()
    }
    for number, piece in enumerate(Progress(pieces, desc="convert", unit="shards", leave=False)):
        place = folder / f"{piece.group[0]}-{'x'.join(map(str, piece.group[1:]))}" if several else folder
        place.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            writer = None
            for tensors, samples in piece.read(np.arange(len(piece.keys))):
                columns = _columns(types, samples)
                numbers = as_numbers(identity, tensors)
                schema = _schema(columns.schema, numbers)
                # the store's identity in every file, so that each can come back alone; the quarantine once
                schema = schema.with_metadata({**schema.metadata, **metadata, **(first if number == 0 else {})})
                arrays = [_nested(values) for values in numbers.values()]
                table = pa.Table.from_arrays([*columns.columns, *arrays], schema=schema)
                if writer is None:
                    path = place / f"{piece.shard.name}.parquet"
                    # opened at the first rows, whose schema it needs
                    writer = stack.enter_context(
                        pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
                    )
                writer.write_table(table)


def _common_types(pieces: Sequence[StoredPiece]) -> dict[str, pa.DataType | None]:
    """By column the type that all shards share; None where they do not: then all its values are JSON text."""
    found: dict[str, set[pa.DataType]] = {}
    for piece in pieces:
        for field in opened(piece.store, piece.shard, ROWS, pq.read_schema):
            found.setdefault(field.name, set()).add(field.type)
    common: dict[str, pa.DataType | None] = {}
    for name, types in found.items():
        # a shard whose values are all null does not decide
        known = types - {pa.null()}
        common[name] = pa.null() if not known else next(iter(known)) if len(known) == 1 else None
    return common


def _columns(types: dict[str, pa.DataType | None], samples: Samples) -> pa.Table:
    arrays = {}
    for name, kind in types.items():
        values = [row.get(name) for row in samples]
        if kind is None:
            values = [None if value is None else json.dumps(value, default=str) for value in values]
        arrays[name] = pa.array(values, pa.string() if kind is None else kind)
    return pa.table(arrays)


def _schema(columns: pa.Schema, numbers: Tensors) -> pa.Schema:
    """With the types and the metadata by which `datasets` knows arrays of a fixed shape."""
    import datasets

    features = {**datasets.Features.from_arrow_schema(columns)}
    for name, values in numbers.items():
        kind = {3: datasets.Array2D, 4: datasets.Array3D, 5: datasets.Array4D}[values.ndim]
        features[name] = kind(values.shape[1:], str(values.dtype))
    return datasets.Features(features).arrow_schema


def _nested(values: npt.NDArray[Any]) -> pa.Array:
    """[n, a, b, ...] as lists in lists, without a copy."""
    array = pa.array(values.reshape(-1))
    for extent in reversed(values.shape[1:]):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, extent, dtype=np.int32), array)
    return array


# --- back -------------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"), key=lambda file: (file.name, file))
    if not found:
        raise UsageError(f"SRC {path}: no .parquet files there")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise WorkError(f"{path}: cannot be read: {why_unreadable(path, error)}") from error


def carried(path: Path) -> Carried | None:
    """Read the sidecar from the metadata of the files, which must all say the same."""
    said: set[bytes | None] = set()
    quarantine = b"[]"
    for file in _files(path):
        with _opened(file) as opened:
            metadata = opened.schema_arrow.metadata or {}
        said.add(metadata.get(CARRIED))
        quarantine = metadata.get(QUARANTINE, quarantine)
    # None among them: files of a stranger beside a store's
    if len(said) > 1:
        raise WorkError(f"{path}: holds files of several stores; convert them one by one")
    (manifest,) = said
    if manifest is None:
        return None
    return parse_carried(b'{"manifest": %b, "quarantine": %b}' % (manifest, quarantine), path)


def read(path: Path, origin: Carried | Claim) -> Found:
    """Find one piece per file."""
    bar = Progress(_files(path), desc="look", unit="files", leave=False)
    return found(path, origin, [sketch for file in bar if (sketch := _sketch(file, origin)).keys])


def _sketch(path: Path, origin: Carried | Claim) -> Sketch:
    with _opened(path) as file:
        for number in range(file.metadata.num_row_groups):
            # by the file's own word, before anything is unpacked
            if file.metadata.row_group(number).total_byte_size > MOST_BYTES:
                raise WorkError(f"{path}: a row group of more than {MOST_BYTES:,} bytes; write smaller ones")
        have = file.schema_arrow.names
        names = {stored_name(name): name for name in have if is_tensor(name)}
        if not names:
            raise WorkError(f"{path}: has no column of latents; it has {', '.join(have)}")
        count = file.metadata.num_rows
        keys = file.read(["key"]).column("key").to_pylist() if "key" in have else []
        first = next(file.iter_batches(1), None)
        if first is None:
            return Sketch(path, [], (), (0, 0, 0), {}, lambda positions: iter(()))
        arrays = {name: _array(path, first.column(column)) for name, column in names.items()}
        rows = first.drop_columns(list(names.values())).to_pylist()
    values = next(iter(arrays.values()))
    group = group_of(rows[0], path) if isinstance(origin, Carried) else origin.group(values.shape[1:])
    if keys and not all(isinstance(key, str) for key in keys):
        raise WorkError(f"{path}: the column key is not text in every row")

    def load(positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        for first, batch, own in _batches(path, positions, chunk_rows(sketch.shape)):
            tensors = {name: _array(path, batch.column(column)) for name, column in names.items()}
            samples = batch.drop_columns(list(names.values())).to_pylist()
            if isinstance(origin, Claim):
                places = (first + own).tolist()
                samples = [
                    origin.row(str(row.pop("key", sketch.keys[at])), at, group, row)
                    for at, row in zip(places, samples, strict=True)
                ]
            yield tensors, samples

    sketch = Sketch(path, keys or [f"{path.name}:{number}" for number in range(count)], values.shape[1:], group,
                    {name: array.dtype for name, array in arrays.items()}, load)  # fmt: skip
    return sketch


def _batches(path: Path, positions: Integers, most: int) -> Iterator[tuple[int, pa.RecordBatch, Integers]]:
    """(place of its first row, rows at the positions that are in it, those positions within it), batch by batch."""
    with _opened(path) as file:
        start = 0
        for number in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            if len(own := positions[(positions >= start) & (positions < stop)]):
                for batch in file.iter_batches(most, row_groups=[number]):
                    # positions ascend, so each batch has a run of them
                    here = own[(own >= start) & (own < start + len(batch))] - start
                    if len(here):
                        yield start, batch.take(pa.array(here)), here
                    start += len(batch)
                    # the rest of the row group holds none of them
                    if start > own[-1]:
                        break
            start = stop


def _array(path: Path, column: pa.Array) -> npt.NDArray[Any]:
    """Lists in lists => [n, ...]. Raises WorkError when they are not all of one length, or something is missing."""
    array = column.storage if isinstance(column, pa.ExtensionArray) else column
    shape = [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.list_value_length(array)
        # equal lengths at every level, or the values would shift between rows unseen
        extent = pc.max(lengths).as_py()
        if array.null_count or not extent or pc.min(lengths).as_py() != extent:
            raise WorkError(f"{path}: latents are missing, or not all of one shape")
        array = array.flatten()
        shape.append(extent)
    if array.null_count or not pa.types.is_primitive(array.type):
        raise WorkError(f"{path}: latents are missing, or not numbers but {array.type}")
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False).reshape(shape)
    return values
