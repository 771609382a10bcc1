"""A text file with one image path or URL a line, relative to the file or absolute; `#` starts a comment line.

The key is the line, the order that of the file. For images that are scattered over disks, and for fixed subsets. The
file may lie at a URL; a URL of a folder means the images below it, in the sorted order of their names.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm_vae.core import files
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded
from ldm_vae.core.text import decode, lines
from ldm_vae.data.decoding import Decoding, endings_of
from ldm_vae.data.files import Names, is_url, printable, read_bytes
from ldm_vae.data.footage import Video, is_footage
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts, told_facts, url_facts
from ldm_vae.data.tree import is_hidden

LISTS = (".txt", ".lst")


class Config(SourceConfig):
    """`data: {kind: list, path: chosen.txt}`, or `path: s3://bucket/photographs`."""

    kind: str = "list"

    def build(self) -> ListSource:
        if self.caption_column is not None:
            raise UsageError("data.caption_column: a list file has no columns; use a folder with metadata.csv")
        if is_url(self.path):
            source = _at_url(self.path, self.decoding())
        else:
            path = expanded(self.path)
            if not path.is_file():
                raise self.absent("a text file of image paths")
            try:
                data = files.read_bytes(path, files.LARGEST)
            except OSError as error:
                raise UsageError(f"data {path}: cannot be read: {error}") from error
            source = ListSource(path.parent, str(path), _lines(data, str(path)), self.decoding())
            source.check_root()
        not_empty(source, self.path, "line that names an image" if self.path.endswith(LISTS) else "image")
        return source


def _at_url(url: str, decoding: Decoding) -> ListSource:
    from ldm_vae.core import fsspec_files  # fsspec, which files have no need of

    if url.endswith(LISTS):
        try:
            data = fsspec_files.read(url)
        except fsspec_files.AbsentError as error:
            raise UsageError(f"data {url}: expected a text file of image paths, nothing is there") from error
        return ListSource(url.rpartition("/")[0], url, _lines(data, url), decoding)
    # as a folder on disk: hidden files, and what has another ending, are no images
    found = {
        name: said
        for name, said in sorted(fsspec_files.listed(url, below=True).items())
        if os.path.splitext(name)[1].lower() in endings_of(decoding)
        and not any(is_hidden(part) for part in name.split("/"))
    }
    return ListSource(url.rstrip("/"), url, found, decoding, [url_facts(said) for said in found.values()])


def _lines(data: bytes, path: str) -> list[str]:
    try:
        text = decode(data)
    except ValueError as error:
        if b"\0" in data:
            raise UsageError(f"data {path}: is no list of paths: {error}") from error
        text = os.fsdecode(data)  # names of files that are not UTF-8
    first_at: dict[str, int] = {}
    for number, line in enumerate(lines(text), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if name in first_at:
            raise UsageError(f"data {path}: line {number} repeats line {first_at[name]} ({printable(name)})")
        first_at[name] = number
    return [*first_at]


class ListSource(Named):
    """The images that a text file names, or that lie below a URL.

    Args:
        root: folder or URL that names are relative to.
        facts: of each image, where a listing has told them.
    """

    columns: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path | str,
        name: str,
        names: Iterable[str],
        decoding: Decoding,
        facts: Sequence[Facts | None] | None = None,
    ) -> None:
        self.decoding, self.root, self.name = decoding, root, name
        self._names, self._facts = Names(names), facts
        if decoding.signal != "image" and (url := next((one for one in self._names if is_url(self._path(one))), None)):
            raise UsageError(
                f"data {name}: clips and sounds are read of files, not of URLs ({printable(url)}); "
                "download them first, or make tar shards of them"
            )

    def check_root(self) -> None:
        """Raises UsageError where the first lines are there below another folder than the list's own."""
        names = [*itertools.islice(self._names, 16)]
        assert isinstance(self.root, Path)
        if any(is_url(path := self._path(name)) or Path(path).exists() for name in names):
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
        if self._facts is not None:
            return self._facts[index]
        path = self._path(self._names[index])
        return told_facts(path) if isinstance(path, str) else file_facts(path)

    def _path(self, name: str) -> Path | str:
        if is_url(name):
            return name
        return f"{self.root}/{name}" if isinstance(self.root, str) else self.root / expanded(name)
