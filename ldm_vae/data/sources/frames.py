"""Folders of frames: each folder that directly holds numbered images is a video, however deep it lies.

`walk/0001.png, walk/0002.png, ...`: the key is the folder's path, the order of frames that of the last number in their
names. Such frames have no time: `frame_rate` is refused. Captions, labels and other columns are those of kind `folder`,
by the name of the folder of frames.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path, PurePosixPath

import numpy as np

from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded
from ldm_vae.data.clips import frame_number
from ldm_vae.data.decoding import EXTENSIONS, Decoding
from ldm_vae.data.files import Names, beneath, printable, read_bytes
from ldm_vae.data.footage import Video
from ldm_vae.data.metadata import TreeColumns
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts
from ldm_vae.data.tree import LeftOut, walk


class Config(SourceConfig):
    """`data: {kind: frames, path: clips, frames: 17}`."""

    kind: str = "frames"

    def build(self) -> FrameFolders:
        root = expanded(self.path)
        if not root.is_dir():
            raise self.absent("a folder of folders of frames")
        if self.frames is None:
            raise UsageError("data.frames: expected the number of frames of a clip, which kind frames needs")
        if self.frame_rate is not None:
            raise UsageError("data.frame_rate: frames in folders have no time; frame_stride takes every so many")
        source = FrameFolders(root, self.decoding(), self.caption_column)
        not_empty(source, self.path, "folder of images")
        return source


class FrameFolders(Named):
    """Folders of frames below `root`, sorted by their POSIX path."""

    counted = "folders of frames"
    by_frame = True
    """Clips are named by the number of their first frame, not by seconds."""

    def __init__(self, root: Path, decoding: Decoding, caption_column: str | None = None) -> None:
        self.root, self.name, self.decoding = root, str(root), decoding
        left_out = LeftOut()
        try:
            found = walk(root, EXTENSIONS, left_out)
        except OSError as error:
            raise UsageError(f"data {root}: cannot be listed: {error.strerror}: {error.filename}") from error
        left_out.tell(self.name)
        found.sort(key=lambda name: (os.path.dirname(name), frame_number(name), name))
        folders = {key: list(names) for key, names in itertools.groupby(found, os.path.dirname)}
        # a folder that is itself the clip has the name that it has where it lies
        clips = [name or "." for name in folders]
        self._columns = TreeColumns(clips, lambda name: (root / name).is_file(), self._read, caption_column)
        names = self._columns.all_names  # also what only a table knows, so that its absence is noticed
        self._names = Names(names)
        del self._columns.all_names
        own = [folders.get("" if name == "." else name, []) for name in names]
        self._frames = Names(itertools.chain.from_iterable(own))
        self._ends = np.cumsum([len(each) for each in own], dtype=np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns.names

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def _paths(self, index: int) -> tuple[str, ...]:
        first, last = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        return tuple(os.fspath(self.root / self._frames[at]) for at in range(first, last))

    def __getitem__(self, index: int) -> Record:
        name, paths = self._names[index], self._paths(index)
        if not paths:
            raise BadImage("no such folder, or no image in it")
        return Record(printable(name), Video(paths), self._columns.of(index, name))

    def facts(self, index: int) -> Facts | None:
        found = [file_facts(path) for path in self._paths(index)]
        known = [each for each in found if each is not None]
        if not known or len(known) < len(found):
            return None
        identity = (hash(tuple(each.identity for each in known)), *self._columns.identity(index, self._names[index]))
        return Facts(sum(each.size for each in known), max(each.changed for each in known), identity)

    def _read(self, name: str) -> bytes:
        return read_bytes(beneath(self.root, str(PurePosixPath(name))))
