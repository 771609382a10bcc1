"""Storage of a store's files as objects: published whole, replaced whole, read whole, listed by folder.

All files of a store are written through this interface: in a folder (here), or straight to an object store
(`object_store.py`). Names are relative to the store, with `/` between folder and file.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ldm_vae.core import atomic_io
from ldm_vae.core.file_record import FileRecord, checksum
from ldm_vae.core.files import LARGEST, open_plain, read_bytes

SCRATCH = "shards"  # the folder of a store that has room for what becomes a shard

Write = Callable[["HashedFile"], None]  # write the content, the same at each call


class Storage(Protocol):
    """Objects by name. What fails ends in a WorkError that names the object."""

    @property
    def scratch(self) -> Path | None:
        """Folder for what is not published yet; None is that of the system ($TMPDIR)."""

    @property
    def connections(self) -> int:
        """Objects that are read at the same time where many are."""

    def prepare(self, *folders: str) -> None:
        """Make the folders, where there are such things."""

    def publish(self, name: str, write: Write) -> FileRecord:
        """Give an object its name when it is complete. One of that name with other content (left by a killed process,
        damaged since) is replaced. Returns its size and checksum."""

    def replace(self, name: str, content: bytes) -> None:
        """Replace a small object in one step: a reader sees the old one or the new one."""

    def create(self, name: str, content: bytes) -> None:
        """Make a small object if there is none of that name: of several writers one is first, and its object stays."""

    def read(self, name: str) -> bytes:
        """Read a small object. Raises FileNotFoundError where there is none."""

    def read_range(self, name: str, first: int, stop: int) -> bytes:
        """Read bytes [first, stop) of an object, or as many of them as there are."""

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

    def names(self, folder: str = "") -> list[str]:
        """List the objects of a folder (of the store itself, with its folders), sorted, without what unfinished
        writers have left there; none where the folder is absent."""

    def sizes(self, folder: str = "") -> Callable[[str], int]:
        """Look up the bytes of objects of one folder by their names, -1 of an absent one."""

    def modified(self, name: str) -> float | None:
        """Seconds, by the clock of the storage, at which an object was last published; None if it is not there."""

    def tidy(self, *folders: str) -> None:
        """Remove what killed writers have left in the store and in these folders of it. The store is the caller's."""


class HashedFile:
    """A file that takes the checksum and the size of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._bytes += len(view)

    @property
    def record(self) -> FileRecord:
        return FileRecord(bytes=self._bytes, sha256=self._digest.hexdigest())


@dataclass(frozen=True)
class LocalFolder:
    """Storage in a folder of a local or network file system."""

    root: Path
    connections: int = 1

    @property
    def scratch(self) -> Path | None:
        return self.root / SCRATCH

    def prepare(self, *folders: str) -> None:
        for name in folders:
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def publish(self, name: str, write: Write) -> FileRecord:
        path, records = self.root / name, []

        def write_hashed(file: BinaryIO) -> None:
            hashed = HashedFile(file)
            write(hashed)
            records.append(hashed.record)

        # linked if the name is absent; the bytes are read back only where another process was first
        if not atomic_io.create(path, write_hashed) and checksum(path) != records[0]:
            atomic_io.replace(path, write_hashed)
        return records[0]

    def replace(self, name: str, content: bytes) -> None:
        atomic_io.replace(self.root / name, atomic_io.data(content))

    def create(self, name: str, content: bytes) -> None:
        atomic_io.create(self.root / name, atomic_io.data(content))

    def read(self, name: str) -> bytes:
        return read_bytes(self.root / name, LARGEST)

    def read_range(self, name: str, first: int, stop: int) -> bytes:
        with open_plain(self.root / name) as file:
            file.seek(first)
            return file.read(stop - first)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        place = self.root / folder
        paths = place.iterdir() if place.exists() else iter(())
        return sorted(str(path.relative_to(self.root)) for path in paths if not atomic_io.is_temporary(path))

    def sizes(self, folder: str = "") -> Callable[[str], int]:
        return self._size  # each is looked at when it is asked for: a process asks for its own alone

    def _size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return -1

    def modified(self, name: str) -> float | None:
        with contextlib.suppress(OSError):
            return (self.root / name).stat().st_mtime
        return None

    def tidy(self, *folders: str) -> None:
        for folder in ("", *folders):
            for path in (self.root / folder).iterdir():
                if atomic_io.is_temporary(path):
                    with contextlib.suppress(OSError):
                        path.unlink()
