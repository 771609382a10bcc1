"""A text file with one image path a line, relative to the file or absolute; `#` starts a comment line.

The key is the line, the order that of the file. For images that are scattered over disks, and for fixed subsets.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ldm_vae.core import files
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded
from ldm_vae.core.text import decode, lines
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.files import Names, printable, read_bytes
from ldm_vae.data.footage import Video, is_footage
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts


class Config(SourceConfig):
    """`data: {kind: list, path: chosen.txt}`."""

    kind: str = "list"

    def build(self) -> ListSource:
        path = expanded(self.path)
        if not path.is_file():
            raise self.absent("a text file of image paths")
        if self.caption_column is not None:
            raise UsageError("data.caption_column: a list file has no columns; use a folder with metadata.csv")
        source = ListSource(path, self.decoding())
        not_empty(source, self.path, "line that names an image")
        return source


class ListSource(Named):
    """The images that a text file names."""

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path, decoding: Decoding) -> None:
        self.decoding = decoding
        self.root, self.name = path.parent, str(path)
        first_at: dict[str, int] = {}
        try:
            data = files.read_bytes(path, files.LARGEST)
        except OSError as error:
            raise UsageError(f"data {path}: cannot be read: {error}") from error
        try:
            text = decode(data)
        except ValueError as error:
            if b"\0" in data:
                raise UsageError(f"data {path}: is no list of paths: {error}") from error
            text = os.fsdecode(data)  # names of files that are not UTF-8
        for number, line in enumerate(lines(text), start=1):
            name = line.strip()
            if not name or name.startswith("#"):
                continue
            if name in first_at:
                raise UsageError(f"data {path}: line {number} repeats line {first_at[name]} ({printable(name)})")
            first_at[name] = number
        self._names = Names(first_at)
        self._check_root(list(itertools.islice(first_at, 16)))

    def _check_root(self, names: Sequence[str]) -> None:
        """Raises UsageError where the first lines are there below another folder than the list's own."""
        if any(self._path(name).exists() for name in names):
            return
        for folder in (Path.cwd(), *self.root.resolve().parents):
            if here := next((name for name in names if (folder / name).is_file()), None):
                raise UsageError(
                    f"data {self.name}: lines are paths relative to the list's folder, {self.root}, where none of the "
                    f"first is; {here} is there from {folder}: move the list, or write whole paths"
                )

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        path = self._path(name)
        return Record(printable(name), Video(str(path)) if is_footage(name) else read_bytes(path))

    def facts(self, index: int) -> Facts | None:
        return file_facts(self._path(self._names[index]))

    def _path(self, name: str) -> Path:
        return self.root / expanded(name)
