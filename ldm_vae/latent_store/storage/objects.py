"""Storage of a store's files as objects: published whole, replaced whole, read whole, listed by folder.

Shards, unit records, the plan, quarantine.jsonl and a changed manifest are written through this interface, so another
kind of storage is another class here. (The first manifest of a store is made in its place, if there is none.) Names are
relative to the store, with `/` between folder and file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ldm_vae.core import atomic_io
from ldm_vae.core.files import LARGEST, read_bytes
from ldm_vae.latent_store.storage.file_record import FileRecord, checksum

Write = Callable[["HashedFile"], None]  # write the content, the same at each call


class Storage(Protocol):
    """Objects by name. What fails ends in a WorkError that names the object."""

    def publish(self, name: str, write: Write) -> FileRecord:
        """Give an object its name when it is complete. One of that name with other content (left by a killed process,
        damaged since) is replaced. Returns its size and checksum."""

    def replace(self, name: str, content: bytes) -> None:
        """Replace a small object in one step: a reader sees the old one or the new one."""

    def read(self, name: str) -> bytes:
        """Read a small object. Raises FileNotFoundError where there is none."""

    def names(self, folder: str) -> list[str]:
        """List the objects of a folder, sorted, without what unfinished writers have left there."""


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

    def read(self, name: str) -> bytes:
        return read_bytes(self.root / name, LARGEST)

    def names(self, folder: str) -> list[str]:
        paths = (self.root / folder).iterdir()
        return sorted(f"{folder}/{path.name}" for path in paths if not atomic_io.is_temporary(path))
