"""Parquet files at URLs, by row: their ends tell how many rows they have, a group of rows is fetched when one of it is
asked for. Groups are kept in the cache folder, the last few of them, so that the workers and processes of a machine
fetch each once between them."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
import secrets
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from ldm_vae.core import atomic_io, fsspec_files
from ldm_vae.core.ahead import ahead
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import cache_dir
from ldm_vae.core.validation import first_line
from ldm_vae.data.stamps import Facts, url_facts

CONNECTIONS = 8  # files whose ends are read at a time
KEPT = 64  # groups: of the usual 100 rows of 100 KB together 640 MB


class RemoteTable:
    """Rows of parquet files, as far as `HubSource` needs them of a `datasets.Dataset`.

    Raises:
        UsageError: a file is not there or no parquet, or has other columns than the first.
        WorkError: the server does not answer.
    """

    cache_files: tuple[Any, ...] = ()

    def __init__(self, urls: list[str]) -> None:
        import datasets

        ends = [*ahead(_end, urls, CONNECTIONS)]
        self._groups: list[tuple[str, int, str, int]] = []  # URL, size, version, number in its file
        counts, told = [], []
        for url, (said, metadata) in zip(urls, ends, strict=True):
            if (names := metadata.schema.to_arrow_schema().names) != ends[0][1].schema.to_arrow_schema().names:
                raise UsageError(f"data {url}: expected the columns of the other files, got {', '.join(names)}")
            # without a version nothing would show that the file was replaced: groups are those of this table alone
            version = fsspec_files.version_of(said) or secrets.token_hex(8)
            told.append(url_facts(said))
            for number in range(metadata.num_row_groups):
                self._groups.append((url, int(said["size"]), version, number))
                counts.append(metadata.row_group(number).num_rows)
        self._stops = [*itertools.accumulate(counts)]
        self.features: dict[str, Any] = datasets.Features.from_arrow_schema(ends[0][1].schema.to_arrow_schema())
        self.column_names = [*self.features]
        self.facts: Facts | None = None
        if all(one is not None for one in told):
            self.facts = Facts(-1, 0, (hash(tuple(one.identity for one in told if one is not None)),))
        self._open: tuple[int, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a worker maps groups of its own

    def with_format(self, kind: None) -> RemoteTable:
        """The rows as they are stored."""
        return self

    def cast_column(self, column: str, feature: Any) -> RemoteTable:
        """The rows as they are stored."""
        return self

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect.bisect_right(self._stops, index)
        if self._open is None or self._open[0] != number:
            self._open = number, _group(*self._groups[number])
        table = self._open[1]
        row: dict[str, Any] = table.slice(table.num_rows - (self._stops[number] - index), 1).to_pylist()[0]
        return row


def _end(url: str) -> tuple[dict[str, Any], Any]:
    """The size and metadata of a file, as its server says."""
    try:
        said = fsspec_files.told(url)
        return said, pq.read_metadata(pa.PythonFile(fsspec_files.RangedFile(url, int(said["size"])), "r"))
    except fsspec_files.AbsentError as error:
        raise UsageError(f"data {url}: no such file") from error
    except (pa.ArrowException, ValueError) as error:
        raise UsageError(f"data {url}: is no parquet file: {first_line(error)}") from error


def _group(url: str, size: int, version: str, number: int) -> pa.Table:
    """A group of rows, mapped from the cache folder, where it is put first."""
    folder = cache_dir() / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(f'{url} {version} {number}'.encode()).hexdigest()}.arrow"
    with FileLock(folder / f"{path.name[:3]}.lock"):
        if not path.exists():
            file = pq.ParquetFile(pa.PythonFile(fsspec_files.RangedFile(url, size), "r"))
            table = file.read_row_group(number)

            def write(sink: Any) -> None:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)

            atomic_io.replace(path, write)
            _forget(folder)
        with contextlib.suppress(OSError):
            os.utime(path)  # those that were not used for the longest leave first
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _forget(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process has just removed one
        groups = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
        for path in groups[:-KEPT]:
            path.unlink(missing_ok=True)  # who has it mapped reads on
