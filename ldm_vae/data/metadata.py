"""Metadata beside the images of a folder or a zip: tables of captions, class folders, text files.

- `metadata.csv|jsonl|parquet`, as in datasets' imagefolder: it lies in a folder of the images it describes or above
  them and names each by a column `file_name`, relative to itself. Held as one arrow table, about its size on disk.
- Class folders, where there is no table: if all images lie equally deep and in several folders, `label` is the number
  of the folder's name among the sorted names, `label_name` the name.
- Text files: with `caption_column: txt` (or another extension) the caption of a.png is the text of a.txt, as kohya's
  trainers keep it.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ldm_vae.core.errors import UsageError
from ldm_vae.core.tables import check_values
from ldm_vae.core.text import decode, lines
from ldm_vae.core.validation import parse_json
from ldm_vae.data.files import normal, printable
from ldm_vae.data.quarantine import BadImage

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".jsonl", ".parquet")

Read = Callable[[str], bytes]
"""Path in the tree => its bytes; raises BadImage when it is not there."""


def rename_caption(columns: Mapping[str, Any], caption_column: str | None) -> dict[str, Any]:
    """Rename the column `caption_column` to `caption`; a column that was called so becomes `caption_before`."""
    if caption_column in (None, "caption") or caption_column not in columns:
        return dict(columns)
    names = {caption_column: "caption", "caption": "caption_before"}
    return {names.get(name, name): value for name, value in columns.items()}


def columns_digest(columns: Mapping[str, Any]) -> bytes:
    """Digest of 16 bytes that changes when a value does, and not on the way through a table: Arrow gives a column one
    type (an integer beside floats becomes one, a dictionary gets the keys of the others as None), or JSON text where no
    type fits (`shards.to_table`)."""
    there = {name: plain for name, value in columns.items() if (plain := _plain(value)) is not None}
    return hashlib.blake2b(json.dumps(there, sort_keys=True).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        try:
            # a column that was kept as JSON text equals the value that it stands for
            parsed = json.loads(value)
            return _plain(parsed)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, Mapping):
        # a key with None equals no key: Arrow adds those of the other rows
        return {str(name): plain for name, each in value.items() if (plain := _plain(each)) is not None}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    # 1, 1.0 and true are one value: a table gives a column one type
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value if value is None or isinstance(value, int | float) else str(value)


class TreeColumns:
    """The columns of the images of a tree, by the name of the image; `all_names` is `names` and what only tables know.

    Args:
        names: POSIX paths of the images that are there.
        exists, read: the tree.
        caption_column: a column of the table, or the extension of text files.

    Raises:
        UsageError: a table cannot be read, or the caption column does not exist.
    """

    def __init__(
        self, names: Sequence[str], exists: Callable[[str], bool], read: Read, caption_column: str | None
    ) -> None:
        self._read = read
        self._captions = caption_column
        tables = _tables(names, exists, read, {"file_name", "caption", "text", caption_column})
        # images that only a table knows are samples too, so that their absence is noticed
        self.all_names = sorted({*names, *(name for table in tables for name in table["file_name"].to_pylist())})
        try:
            self._table = pa.concat_tables(tables, promote_options="permissive") if tables else None
        except pa.ArrowException as error:
            raise UsageError(f"data: the metadata tables have a column of different types: {error}") from error
        have: tuple[str, ...] = ()
        self.label_names: tuple[str, ...] = ()
        if self._table is not None:
            have = tuple(name for name in self._table.column_names if name != "file_name")
            named = self._table["file_name"].to_pylist()
            row_of = {name: row for row, name in enumerate(named)}
            if len(row_of) < len(named):
                name, count = Counter(named).most_common(1)[0]
                logger.warning("data: metadata names %s %d times, %d rows repeat; the last one counts",
                               printable(name), count, len(named) - len(row_of))  # fmt: skip
            self._rows = np.array([row_of.get(name, -1) for name in self.all_names], dtype=np.int64)
        else:
            self.label_names = _class_folders(names)
            have = ("label", "label_name") if self.label_names else ()
        self._table_columns = have if self._table is not None else ()
        self._beside = caption_column is not None and caption_column not in have
        if self._beside:
            if not any(exists(self._text_of(name)) for name in names):
                raise UsageError(
                    f"caption_column {caption_column}: no such column (there are: {', '.join(have) or 'none'}) "
                    f"and no image has a .{caption_column} file beside it"
                )
            have = (*have, str(caption_column))
        self.names: tuple[str, ...] = tuple(rename_caption(dict.fromkeys(have), caption_column))

    def of(self, index: int, name: str) -> dict[str, Any]:
        """The columns of image `index` of `all_names`, whose name is `name`; None where nothing is known."""
        columns = self._held(index, name)
        if self._beside:
            columns[str(self._captions)] = self._text(name)
        return rename_caption(columns, self._captions)

    def _held(self, index: int, name: str) -> dict[str, Any]:
        """Columns other than those that are files of their own."""
        columns: dict[str, Any] = {}
        if self._table is not None:
            row = int(self._rows[index])
            columns = {column: None if row < 0 else self._table[column][row].as_py() for column in self._table_columns}
        if self.label_names:
            class_name = printable(PurePosixPath(name).parent.name)
            columns |= {"label": self.label_names.index(class_name), "label_name": class_name}
        return columns

    def text_beside(self, name: str) -> str | None:
        """The text file that holds the caption of an image; None when captions are elsewhere."""
        return self._text_of(name) if self._beside else None

    def identity(self, index: int, name: str) -> tuple[int, ...]:
        """A digest of the image's columns, text files apart; () without columns."""
        columns = self._held(index, name)
        return (int.from_bytes(columns_digest(columns)[:8], "little"),) if columns else ()

    def _text_of(self, name: str) -> str:
        return str(PurePosixPath(name).with_suffix(f".{self._captions}"))

    def _text(self, name: str) -> str | None:
        try:
            data = self._read(self._text_of(name))
        except BadImage:
            return None
        try:
            return decode(data).strip()
        except ValueError as error:
            raise BadImage(f"its caption {printable(self._text_of(name))}: {error}") from error


def _tables(
    names: Sequence[str], exists: Callable[[str], bool], read: Read, keep: Collection[str | None]
) -> list[pa.Table]:
    """Every metadata table in the folders of the images and in those above them."""
    folders = {parent for name in names for parent in PurePosixPath(name).parents}
    tables = []
    for folder in sorted({*folders, PurePosixPath()}):
        here = [str(folder / f"metadata{suffix}") for suffix in SUFFIXES]
        here = [name for name in here if exists(name)]
        if len(here) > 1:
            raise UsageError(f"data: expected one metadata table in a folder, found {here[0]} and {here[1]}")
        tables += [_table(folder, name, read(name), keep) for name in here]
    return tables


def _table(folder: PurePosixPath, name: str, data: bytes, keep: Collection[str | None]) -> pa.Table:
    """A metadata table with `file_name` relative to the root of the tree."""
    try:
        if name.endswith(".csv"):
            table = _csv(data, keep)
        elif name.endswith(".jsonl"):
            # by Python: Arrow makes times of strings that look like some
            table = pa.Table.from_pylist([parse_json(line) for line in lines(decode(data)) if line.strip()])
        else:
            table = _in_microseconds(name, pa.parquet.read_table(io.BytesIO(data)))
        check_values(table)
    except (pa.ArrowException, OSError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise UsageError(f"data: {name} cannot be read: {str(error).splitlines()[0]}") from error
    if "file_name" not in table.column_names:
        have = ", ".join(table.column_names)
        raise UsageError(f"data: {name} has no column `file_name` that names the images; it has {have}")
    names = [str(folder / normal(str(relative))) for relative in table["file_name"].to_pylist()]
    return table.set_column(table.column_names.index("file_name"), "file_name", pa.array(names, pa.string()))


def _in_microseconds(name: str, table: pa.Table) -> pa.Table:
    """Times as Python has them: a store would hold another value than a table of nanoseconds, and count as stale."""
    for at, field in enumerate(table.schema):
        if (pa.types.is_timestamp(field.type) or pa.types.is_duration(field.type)) and field.type.unit == "ns":
            kind = pa.duration("us") if pa.types.is_duration(field.type) else pa.timestamp("us", field.type.tz)
            cut = table.column(at).cast(kind, safe=False)
            if not cut.cast(field.type).equals(table.column(at)):
                logger.warning("data: %s: column %s is cut to microseconds", name, field.name)
            table = table.set_column(at, field.name, cut)
    return table


def _csv(data: bytes, keep: Collection[str | None]) -> pa.Table:
    """A CSV file as it is written. A column that is not to be kept as text becomes one of numbers only where each of
    them, written out, is the text again (`007`, `1.50`, `true` and `2020-01-02` stay text)."""
    text = decode(data).encode()
    names = pa.csv.open_csv(io.BytesIO(text)).schema.names
    table = pa.csv.read_csv(
        io.BytesIO(text),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    for at, name in enumerate(table.column_names):
        for kind in () if name in keep else (pa.int64(), pa.float64()):
            try:
                numbers = table[name].cast(kind)
            except pa.ArrowInvalid:
                continue
            if numbers.null_count < len(numbers) and numbers.cast(pa.string()).equals(table[name]):
                table = table.set_column(at, name, numbers)
                break
    return table


def _class_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Sorted names of the class folders, empty where the folders do not look like classes."""
    depths = {name.count("/") for name in names}
    classes = {printable(PurePosixPath(name).parent.name) for name in names}
    return tuple(sorted(classes)) if len(depths) == 1 and depths != {0} and len(classes) > 1 else ()
