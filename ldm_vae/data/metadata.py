"""Captions and other columns beside a folder of images: metadata.csv, .jsonl or .parquet, as in datasets' imagefolder.

The table lies in the folder of the images it describes (or above it) and names each by a column `file_name`, relative
to the table. It is held as one arrow table, about its size on disk.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ldm_vae.errors import UsageError

SUFFIXES = (".csv", ".jsonl", ".parquet")


class Metadata:
    """The columns of every image, by its index among the keys.

    Args:
        tables: arrow tables, each with a column `file_name` already relative to the root.
        keys: the sorted keys of the images.
    """

    def __init__(self, tables: Sequence[pa.Table], keys: Sequence[str]) -> None:
        self._table = pa.concat_tables(tables, promote_options="permissive")
        row_of = {name: row for row, name in enumerate(self._table["file_name"].to_pylist())}
        self._rows = np.fromiter((row_of.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
        self.columns: tuple[str, ...] = tuple(name for name in self._table.column_names if name != "file_name")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of one image; all None where the table does not name it."""
        row = int(self._rows[index])
        if row < 0:
            return dict.fromkeys(self.columns)
        return {name: self._table[name][row].as_py() for name in self.columns}


def find_tables(root: Path, folders: Sequence[str]) -> list[tuple[str, Path]]:
    """(folder relative to root, path) of every metadata table in `root` and in `folders` of it.

    Raises:
        UsageError: two tables in one folder.
    """
    found = []
    for folder in sorted({"", *folders}):
        here = [root / folder / f"metadata{suffix}" for suffix in SUFFIXES]
        here = [path for path in here if path.is_file()]
        if len(here) > 1:
            raise UsageError(f"data {root / folder}: expected one metadata table, found {here[0].name}, {here[1].name}")
        found += [(folder, path) for path in here]
    return found


def read_table(folder: str, path: Path) -> pa.Table:
    """A metadata table with `file_name` relative to the root that `folder` is relative to.

    Raises:
        UsageError: it cannot be read, or has no column file_name.
    """
    try:
        if path.suffix == ".csv":
            table = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
        elif path.suffix == ".jsonl":
            table = pa.json.read_json(path)
        else:
            table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UsageError(f"data: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if "file_name" not in table.column_names:
        have = ", ".join(table.column_names)
        raise UsageError(f"data: {path} has no column `file_name` that names the images; it has {have}")
    names = [str(PurePosixPath(folder, str(name))) for name in table["file_name"].to_pylist()]
    return table.set_column(table.column_names.index("file_name"), "file_name", pa.array(names, pa.string()))
