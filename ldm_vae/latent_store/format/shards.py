"""The files of one shard: NAME.safetensors holds the tensors, NAME.parquet the rows, NAME.arrow the rows once more.

There is one writer, and its bytes depend on the rows alone: no timestamp, host or process count. Rows arrive in pieces
and are spooled to an unnamed file, so a unit of large latents needs no memory; the header comes first in the final file
and the tensors follow in one pass that also takes the checksum.

`.arrow` is the parquet's table as an uncompressed Arrow IPC file: parquet cannot be read at random, a mapped Arrow file
can. It is derived; a reader that misses it falls back to the parquet.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ldm_vae.core.errors import WorkError
from ldm_vae.core.file_record import FileRecord
from ldm_vae.core.tables import check_values, kinds_within
from ldm_vae.core.validation import parse_json, why_unreadable
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.layout import CLIP_FRAMES, MAPPED_ROWS, ROWS, STATISTICS, TENSORS
from ldm_vae.latent_store.storage.objects import HashedFile, Storage


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType) and bool(pa.types.is_integer(kind.value_type))


# a column that a store itself writes => the type that it has there, in words and as a test; null where nothing is
# known. `image_bytes` is not among them: a store of an older version has a source's own column under that name.
OWN_TYPES: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    **dict.fromkeys(("key", "source", "image_sha256", "bucket"), ("text", pa.types.is_string)),
    **dict.fromkeys(("source_index", "resolution", CLIP_FRAMES), ("whole numbers", pa.types.is_integer)),
    "original_size": ("lists of whole numbers", _is_list_of_numbers),
}
HEADER_ALIGNMENT = 4096  # tensors begin on a page

# safetensors' name of a dtype => bytes per value and the numpy dtype that holds it (numpy has no bfloat16)
STORAGE: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard: its name, safetensors dtype and the shape of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * STORAGE[self.dtype].itemsize


class Spool:
    """Rows of a shard that is being made, in a file without a name: a kill leaves nothing behind."""

    def __init__(self, folder: Path | None, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.rows = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)

    def append(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add rows: one array [n, *shape] per spec, in storage dtype."""
        pieces = [np.ascontiguousarray(tensors[spec.name]) for spec in self.specs]
        count = len(pieces[0])
        if count:
            # row by row, all tensors of a row side by side: one write a batch, whatever the number of tensors
            self._file.write(np.concatenate([piece.view(np.uint8).reshape(count, -1) for piece in pieces], 1).data)
            self.rows += count

    def read(self, name: str, first: int, stop: int) -> npt.NDArray[Any]:
        """Rows [first, stop) of one tensor, [n, *shape]."""
        position = [spec.name for spec in self.specs].index(name)
        spec = self.specs[position]
        start = sum(other.row_bytes for other in self.specs[:position])
        # the tensor's bytes within each row, copied out of the map
        raw = self._mapped()[first:stop, start : start + spec.row_bytes]
        values: npt.NDArray[Any] = np.ascontiguousarray(raw).view(STORAGE[spec.dtype])
        return values.reshape(-1, *spec.shape)

    def _mapped(self) -> npt.NDArray[np.uint8]:
        # the map sees the file alone, not Python's buffer
        self._file.flush()
        width = sum(spec.row_bytes for spec in self.specs)
        return np.memmap(self._file, dtype=np.uint8, mode="r", shape=(self.rows, width))

    def close(self) -> None:
        """Give the disk space back."""
        with contextlib.suppress(OSError):  # a full disk: what is still buffered is not wanted any more
            self._file.close()


def write_tensors(
    storage: Storage, name: str, spool: Spool, statistics: npt.NDArray[np.float64] | None, metadata: Mapping[str, str]
) -> FileRecord:
    """Publish NAME.safetensors with the spooled rows and the table of sums, if there is one."""
    header = _header(spool, None if statistics is None else statistics.shape, metadata)

    def write(file: HashedFile) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        if statistics is not None:
            file.write(np.ascontiguousarray(statistics, dtype="<f8"))
        for spec in spool.specs:
            step = chunk_rows(spec.shape)
            for first in range(0, spool.rows, step):
                file.write(spool.read(spec.name, first, min(first + step, spool.rows)))

    return storage.publish(f"{name}.{TENSORS}", write)


def _header(spool: Spool, statistics: tuple[int, ...] | None, metadata: Mapping[str, str]) -> bytes:
    """The JSON header. The sums come first: 8-byte values need an 8-byte offset, rows may be of odd length."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    if statistics is not None:
        offset = 8 * int(np.prod(statistics))
        entries[STATISTICS] = {"dtype": "F64", "shape": list(statistics), "data_offsets": [0, offset]}
    for spec in spool.specs:
        end = offset + spool.rows * spec.row_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": [spool.rows, *spec.shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)


def write_rows(storage: Storage, name: str, table: pa.Table) -> dict[str, FileRecord]:
    """Publish NAME.parquet and NAME.arrow, one row per sample."""
    return {ROWS: write_parquet(storage, name, table), MAPPED_ROWS: write_mapped_rows(storage, name, table)}


def write_parquet(storage: Storage, name: str, table: pa.Table) -> FileRecord:
    """Publish NAME.parquet."""
    content = _as_parquet(table)
    return storage.publish(f"{name}.{ROWS}", lambda file: file.write(content))


def _as_parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", version="2.6", row_group_size=1 << 20, store_schema=False)
    return sink.getvalue()


def write_mapped_rows(storage: Storage, name: str, table: pa.Table) -> FileRecord:
    """Publish NAME.arrow: one record batch, uncompressed."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content = sink.getvalue()
    return storage.publish(f"{name}.{MAPPED_ROWS}", lambda file: file.write(content))


def to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table; a column whose values do not share a type is kept as JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [_plain(row.get(name)) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            columns[name] = pa.array([json.dumps(value, default=str, sort_keys=True) for value in values])
    # as it comes back from a parquet file (names of list elements, ...), so that either copy gives the other's bytes
    return pq.read_table(pa.BufferReader(_as_parquet(pa.table(columns))))


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as Python values, which pyarrow takes in any nesting; a UUID or a duration,
    for which parquet has no type, as text."""
    if isinstance(value, uuid.UUID | datetime.timedelta):
        return str(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def to_float(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Stored values as numbers: bfloat16 bits become float32, the others are numbers already."""
    return (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values


# --- reading ----------------------------------------------------------------------------------------------------------


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped, read-only. torch's mapping holds no file descriptor (numpy's does): a process that
    reads a store of thousands of shards stays below the usual limit of 1,024."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    raw: npt.NDArray[np.uint8] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    raw.flags.writeable = False
    return raw


def map_tensors(path: Path, rows: int = 0, specs: Sequence[TensorSpec] = ()) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a shard as read-only arrays that are mapped, not read; bfloat16 comes as its 16 bits (uint16).

    Args:
        specs: tensors of `rows` rows that must be there, of this type and shape (-1: any extent).

    Raises:
        WorkError: the file is missing, truncated, not a shard, or not of these tensors.
    """
    try:
        raw = map_file(path)
        length = int.from_bytes(raw[:8].tobytes(), "little")
        # the header's length is the file's own claim: it must lie within the file
        if not 2 <= length <= min(len(raw) - 8, 100_000_000):
            raise ValueError("no safetensors header")
        header = parse_json(raw[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for spec in specs:
            _check_entry(spec, rows, header.get(spec.name))
        return {name: _view(raw[8 + length :], entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WorkError(
            f"shard {path}: cannot be read: {why_unreadable(path, error)}; `ldm-vae store verify` tells what is damaged"
        ) from error


def _check_entry(spec: TensorSpec, rows: int, entry: Mapping[str, Any] | None) -> None:
    # 16 bits are two floats or an integer: the type is what the header says, and must be what the manifest says
    wanted, found = [rows, *spec.shape], (entry or {}).get("shape", [])
    fits = len(found) == len(wanted) and all(one in (-1, other) for one, other in zip(wanted, found, strict=True))
    if entry is None or entry["dtype"] != spec.dtype or not fits:
        came = "is missing" if entry is None else f"is {entry['dtype']} {found}"
        raise ValueError(f"tensor {spec.name} {came}, the manifest says {spec.dtype} {wanted}")


def _view(data: npt.NDArray[np.uint8], entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    first, stop = entry["data_offsets"]
    dtype, shape = STORAGE[entry["dtype"]], tuple(entry["shape"])
    # offsets and shape are believed once they fit each other and the file
    if not 0 <= first <= stop <= len(data) or stop - first != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError("truncated, or its header does not fit its size")
    values: npt.NDArray[Any] = np.asarray(data[first:stop]).view(dtype)
    return values.reshape(shape)


def map_rows(stem: Path, rows: int | None = None) -> pa.Table:
    """The table of a shard: mapped from .arrow, or read from .parquet where that is missing.

    Raises:
        WorkError: the file is damaged, or has not the number of `rows`.
    """
    mapped = stem.with_name(f"{stem.name}.{MAPPED_ROWS}")
    if not mapped.exists():
        return read_rows(stem, rows=rows)
    with _readable(mapped):
        table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(map_file(mapped)))).read_all()
        return check_table(_of_rows(table, rows), whole=True)


def read_rows(
    stem: Path, columns: Sequence[str] | None = None, rows: int | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """The table of a shard from its .parquet; beside `columns` those of the `optional` that are there.

    Raises:
        WorkError: as `map_rows`; one of the `columns` is not there.
    """
    path = stem.with_name(f"{stem.name}.{ROWS}")
    with _readable(path):
        head = pq.read_metadata(path)
        _of_rows(head, rows)  # before it is unpacked: a few bytes can stand for 10^9 equal rows
        if columns is not None and optional:
            there = head.schema.to_arrow_schema().names
            columns = [*columns, *(name for name in optional if name in there)]
        table = pq.read_table(path, columns=None if columns is None else list(columns))
        return check_table(table, whole=columns is None)


def row_columns(stem: Path) -> list[str]:
    """The names of a shard's columns. Raises WorkError as `map_rows`."""
    path = stem.with_name(f"{stem.name}.{ROWS}")
    with _readable(path):
        names: list[str] = pq.read_schema(path).names
        return names


def check_table(table: pa.Table, whole: bool) -> pa.Table:
    """The table, if a store can hold it. Raises ValueError for columns of the store's own that have another type or
    value than they are written with, and for others whose values are none: text that is not UTF-8, times that no clock
    shows, types of an extension."""
    check_values(table)
    if whole and "key" not in table.column_names:
        raise ValueError("it has no column key")
    for field in table.schema:
        column, kinds = table.column(field.name), kinds_within(field.type)
        wanted, fits = OWN_TYPES.get(field.name, ("a type of Arrow's own", lambda kind: True))
        unknown = pa.types.is_null(field.type) and field.name != "key"
        if any(map(_is_foreign, kinds)) or not (unknown or fits(field.type)):
            raise ValueError(f"column {field.name}: expected {wanted}, got {field.type}")
        if field.name == "key" and column.null_count:
            raise ValueError("column key: expected text in every row, got null")
        if field.name == "image_sha256":
            good = pc.match_substring_regex(column.cast(pa.string()), "^[0-9a-f]{64}$")
            if pc.any(pc.invert(good)).as_py():
                raise ValueError("column image_sha256: expected 64 hexadecimal digits")
    return table


def _is_foreign(kind: pa.DataType) -> bool:
    """True for a type that no value of Python becomes, and that Arrow's own functions do not all know."""
    views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    return views or pa.types.is_map(kind) or isinstance(kind, pa.BaseExtensionType | pa.RunEndEncodedType)


def _of_rows(table: Any, rows: int | None) -> Any:
    if rows is not None and table.num_rows != rows:
        raise ValueError(f"has {table.num_rows:,} rows, the manifest says {rows:,}")
    return table


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, OverflowError, RuntimeError, pa.ArrowException) as error:
        raise WorkError(
            f"shard {path}: cannot be read: {why_unreadable(path, error)}; `ldm-vae store verify` tells more"
        ) from error
