"""A folder of images, however deep: the key is the path below it, the order is the sorted order of keys.

Captions, labels and other columns: see ldm_vae/data/metadata.py.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded
from ldm_vae.data import footage
from ldm_vae.data.decoding import Decoding, endings_of
from ldm_vae.data.files import Names, beneath, check_unique, printable, read_bytes
from ldm_vae.data.metadata import TreeColumns
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts
from ldm_vae.data.tree import LeftOut, walk


class Config(SourceConfig):
    """`data: {kind: folder, path: photographs}`."""

    kind: str = "folder"

    def build(self) -> FolderSource:
        root = expanded(self.path)
        if not root.is_dir():
            raise self.absent("a folder of images")
        if self.split != "train":
            there = f"; {root / self.split} is there" if (root / self.split).is_dir() else ""
            raise UsageError(f"data.split {self.split}: a folder is taken whole, name the sub-folder itself{there}")
        source = FolderSource(root, self.decoding(), self.caption_column)
        what = f"image ({', '.join(sorted(endings_of(source.decoding)))}); hidden files do not count"
        if not len(source) and self.frames is None and (videos := len(walk(root, footage.EXTENSIONS))):
            what = f"image; its videos ({videos:,}) are read with data.frames (--frames), the frames of a clip"
        if not len(source) and self.sample_rate is None and (sounds := len(walk(root, footage.SOUNDS))):
            what = f"image; its sounds ({sounds:,}) are read with data.sample_rate (--sample_rate)"
        not_empty(source, self.path, what)
        return source


class FolderSource(Named):
    """Images below `root`, sorted by their POSIX path."""

    def __init__(self, root: Path, decoding: Decoding, caption_column: str | None = None) -> None:
        self.root, self.name = root, str(root)
        self._path = os.fspath(root)
        self.decoding = decoding
        left_out = LeftOut()
        try:
            found = walk(root, endings_of(decoding), left_out)
        except OSError as error:
            raise UsageError(f"data {root}: cannot be listed: {error.strerror}: {error.filename}") from error
        left_out.tell(self.name)
        names = [unicodedata.normalize("NFC", name) for name in found]
        # as the disk has them, where that is another form of Unicode
        self._on_disk = {name: raw for name, raw in zip(names, found, strict=True) if name != raw}
        self._columns = TreeColumns(names, self._exists, self._read, caption_column)
        self._names = Names(self._columns.all_names)
        del self._columns.all_names  # held once, packed
        if self._on_disk:
            check_unique(Names(names), self.name, "two forms of Unicode (NFC and NFD) of one name; rename one")

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns.names

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the class folders; empty if there are none."""
        return self._columns.label_names

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        if not footage.is_footage(name):
            return Record(printable(name), self._read(name), self._columns.of(index, name))
        beneath(self.root, name)
        return Record(printable(name), footage.Video(self._place(name)), self._columns.of(index, name))

    def facts(self, index: int) -> Facts | None:
        name = self._names[index]
        facts = file_facts(self._place(name), self._columns.identity(index, name))
        text = self._columns.text_beside(name)
        beside = None if text is None else file_facts(self._place(text))
        if facts is None or beside is None:  # without a text beside it, an image has none there that could change
            return facts
        return Facts(facts.size, max(facts.changed, beside.changed), (*facts.identity, *beside.identity))

    def _exists(self, name: str) -> bool:
        return os.path.isfile(self._place(name))

    def _read(self, name: str) -> bytes:
        beneath(self.root, name)
        return read_bytes(self._place(name))

    def _place(self, name: str) -> str:
        """The path of an image, or of a text beside one, as the disk has it."""
        place = f"{self._path}/{self._on_disk.get(name, name)}"
        if not name.isascii() and not os.path.lexists(place):
            return f"{self._path}/{unicodedata.normalize('NFD', name)}"
        return place
