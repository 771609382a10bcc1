"""A folder of images, however deep: the key is the path below it, the order is the sorted order of keys.

Other columns come from `metadata.csv|jsonl|parquet` (metadata.py), or, with no such table, from class folders: where
all images lie one folder deep or deeper at one depth and in several folders, `label` is the number of the folder's
name among the sorted names and `label_name` the name (as datasets' imagefolder). With `caption_column: txt` (or any
other extension) captions are read from a text file beside each image, as kohya's and NovelAI's trainers keep them.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ldm_vae.data.captions import rename_caption
from ldm_vae.data.decoding import EXTENSIONS, Decoding
from ldm_vae.data.files import Names, beneath, printable, read_bytes, walk
from ldm_vae.data.metadata import Metadata, find_tables, read_table
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Record, SourceConfig, not_empty
from ldm_vae.errors import UsageError


class Config(SourceConfig):
    """`data: {kind: folder, path: photographs}`."""

    kind: str = "folder"

    def build(self) -> FolderSource:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UsageError(f"data.path {self.path}: expected a folder of images, found no such folder")
        if self.split != "train":
            there = f"; {root / self.split} is there" if (root / self.split).is_dir() else ""
            raise UsageError(f"data.split {self.split}: a folder is taken whole, name the sub-folder itself{there}")
        source = FolderSource(root, self.decoding(), self.caption_column)
        not_empty(source, self.path, f"image ({', '.join(sorted(EXTENSIONS))}); hidden files do not count")
        return source


class FolderSource:
    """Images below `root`, sorted by their POSIX path."""

    def __init__(self, root: Path, decoding: Decoding, caption_column: str | None = None) -> None:
        self.root = root
        self.decoding = decoding
        try:
            found = walk(root, EXTENSIONS)
        except OSError as error:
            raise UsageError(f"data {root}: cannot be listed: {error.strerror}: {error.filename}") from error
        parents = {str(PurePosixPath(name).parent) for name in found}
        tables = [read_table(folder, path) for folder, path in find_tables(root, sorted(parents))]
        if tables:  # images that only the table knows are in the source too, so that their absence is noticed
            found = sorted({*found, *(name for table in tables for name in table["file_name"].to_pylist())})
        self._names = Names(found)
        self._metadata = Metadata(tables, found) if tables else None
        self.label_names = () if tables else _class_folders(found)
        self._captions = caption_column
        have = self._metadata.columns if self._metadata else ("label", "label_name") if self.label_names else ()
        self._beside = caption_column is not None and caption_column not in have
        if self._beside and not any((root / name).with_suffix(f".{caption_column}").is_file() for name in found):
            exist = ", ".join(have) or "none"
            raise UsageError(
                f"caption_column {caption_column}: no such column (there are: {exist}) "
                f"and no image has a .{caption_column} file beside it"
            )
        self.columns: tuple[str, ...] = tuple(rename_caption(dict.fromkeys(self._with_caption(have)), caption_column))

    def _with_caption(self, have: tuple[str, ...]) -> tuple[str, ...]:
        return (*have, str(self._captions)) if self._beside else have

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        path = beneath(self.root, name)
        columns: dict[str, Any] = dict(self._metadata[index]) if self._metadata else {}
        if self.label_names:
            class_name = printable(PurePosixPath(name).parent.name)
            columns |= {"label": self.label_names.index(class_name), "label_name": class_name}
        if self._beside:
            columns[str(self._captions)] = _text(path.with_suffix(f".{self._captions}"))
        return Record(printable(name), read_bytes(path), rename_caption(columns, self._captions))


def _text(path: Path) -> str | None:
    try:
        return read_bytes(path).decode("utf-8", "replace").strip()
    except BadImage:
        return None


def _class_folders(names: list[str]) -> tuple[str, ...]:
    """Sorted names of the class folders, empty where the folders do not look like classes."""
    depths = {name.count("/") for name in names}
    classes = {printable(PurePosixPath(name).parent.name) for name in names}
    return tuple(sorted(classes)) if len(depths) == 1 and depths != {0} and len(classes) > 1 else ()
