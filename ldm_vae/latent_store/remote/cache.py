"""Files of remote stores on the local disk: named by their checksum, so never stale, and bounded in bytes.

One folder for all stores, $XDG_CACHE_HOME/ldm-vae/stores. Of several processes that want a file one downloads it, the
others wait. The least recently used file is evicted when room is needed; a process that has it mapped reads on, until
it gives that map up (`read/mapped_files.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.file_record import FileRecord
from ldm_vae.core.fsspec_files import ATTEMPTS, download
from ldm_vae.core.paths import cache_dir

VARIABLE = "LDM_VAE_STORE_CACHE"
USUAL_LIMIT = 50 * 10**9
LOCKS = "locks"
ABANDONED = 3600.0  # seconds without a byte: the download of a process that was killed


@dataclass(frozen=True)
class Cache:
    """A folder of files named CHECKSUM.EXTENSION that together have at most `limit` bytes, plus what is on its way."""

    folder: Path
    limit: int

    def path(self, record: FileRecord, extension: str) -> Path:
        """Path of a file in the cache, whether or not it is there."""
        return self.folder / f"{record.sha256}.{extension}"

    def holds(self, record: FileRecord, extension: str) -> bool:
        """True if the file is there and has as many bytes as it should."""
        try:
            return self.path(record, extension).stat().st_size == record.bytes
        except OSError:
            return False

    def fetch(self, url: str, record: FileRecord, extension: str, *, attempts: int = ATTEMPTS) -> Path:
        """The local copy of the file at `url`, downloaded if it is not there yet.

        Raises:
            AbsentError: no such file there.
            WorkError: it cannot be read, or the cache cannot be written.
        """
        path = self.path(record, extension)
        if not self.holds(record, extension):
            try:
                (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
                # 16^3 locks shared by hash prefix, for any number of files; a collision only delays a download
                with FileLock(self.folder / LOCKS / record.sha256[:3]):
                    if not self.holds(record, extension):
                        for left in self.folder.glob(f".{path.name}.*{atomic_io.TEMPORARY_SUFFIX}"):  # by a killed one
                            left.unlink(missing_ok=True)
                        # before the download: what is on its way counts beside the limit
                        self._make_room(record.bytes)
                        download(url, path, record, attempts=attempts)
            except OSError as error:
                raise WorkError(
                    f"{atomic_io.explained(error, self.folder)}; XDG_CACHE_HOME names another folder"
                ) from error
        with contextlib.suppress(OSError):  # evicted since, or somebody else's cache
            # eviction goes by mtime, which this marks as used now
            os.utime(path)
        return path

    def clear(self) -> int:
        """Remove what is there, downloads under way and what a process still reads aside. Returns bytes."""
        before = self.bytes
        self._make_room(self.limit)
        return before - self.bytes

    @property
    def bytes(self) -> int:
        """Bytes that it holds."""
        return sum(file.bytes for file in _files(self.folder))

    def _make_room(self, size: int) -> None:
        files = sorted(_files(self.folder), key=lambda file: file.used)
        total = sum(file.bytes for file in files)
        for file in files:
            if total + size <= self.limit:
                break
            # a download under way is spared, unless no byte of it has come for an hour
            if not atomic_io.is_temporary(file.path) or time.time() - file.used > ABANDONED:
                file.path.unlink(missing_ok=True)
                total -= file.bytes


@dataclass(frozen=True)
class _File:
    path: Path
    bytes: int
    used: float
    """Seconds since 1970; of a download on its way, when bytes last came."""


def _files(folder: Path) -> list[_File]:
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # evicted by another process just now
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    found.append(_File(Path(entry.path), stat.st_size, stat.st_mtime))
    return found


def open_cache(limit: float | None = None) -> Cache:
    """The user's cache, of at most `limit` bytes: else $LDM_VAE_STORE_CACHE, else 50 GB or half of what is free.

    Raises:
        UsageError: the limit is not a positive number.
    """
    folder = cache_dir() / "stores"
    if limit is None and (said := os.environ.get(VARIABLE)):
        try:
            limit = float(said)
        except ValueError as error:
            raise UsageError(f"{VARIABLE}: expected a number of bytes, such as 50e9, got {said!r}") from error
    if limit is None:
        exists = next(place for place in (folder, *folder.parents) if place.exists())
        # what the cache holds already counts as free: it may be evicted
        room = shutil.disk_usage(exists).free + sum(file.bytes for file in _files(folder))
        limit = min(USUAL_LIMIT, room // 2)
    if not limit > 0:
        raise UsageError(f"cache_bytes: expected a number of bytes above 0, got {limit}")
    return Cache(folder, int(limit))
