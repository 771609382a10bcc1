"""Image files: reading them, and long lists of their names.

Legend: N files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ldm_vae.data.quarantine import BadImage

MAX_BYTES = 2**30  # a larger "image" is a disk image under a wrong name


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes. Raises BadImage when it cannot be read, is no plain file (a FIFO would hang) or is enormous."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a plain file")
            if status.st_size > MAX_BYTES:
                raise BadImage(f"a file of {status.st_size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:.0f}")
            return file.read()
    except (OSError, ValueError) as error:
        raise BadImage(_reason(error)) from error


def read_range(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """`size` bytes of a file. Raises BadImage when there are fewer, or more than MAX_BYTES are asked for."""
    if size > MAX_BYTES:
        raise BadImage(f"a member of {size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:.0f}")
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
    except (OSError, ValueError, OverflowError) as error:
        raise BadImage(_reason(error)) from error
    if len(data) < size:
        raise BadImage("the archive is cut off here")
    return data


def check_member_name(name: str) -> None:
    """Raise BadImage for a member of an archive whose name would climb out of the folder it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        raise BadImage("its name climbs out of the archive")


def _reason(error: OSError | ValueError | OverflowError) -> str:
    code = getattr(error, "errno", None)
    known = {errno.ENOENT: "no such file (it vanished, or never was)", errno.EACCES: "permission denied"}
    return known.get(code, f"cannot be read: {getattr(error, 'strerror', None) or error}")  # type: ignore[arg-type]


def beneath(root: Path, relative: str) -> Path:
    """root / relative. Raises BadImage when that climbs out of root."""
    if os.path.isabs(relative) or ".." in Path(relative).parts:
        raise BadImage("its path leaves the folder of the data")
    return root / relative


class Names:
    """A sequence of strings in two arrays: N names of 40 characters take 48 N bytes instead of 100 N, and worker
    processes share the pages (a list of str is copied into each, one reference count after the other)."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def printable(name: str) -> str:
    """A file name as a key: what is not UTF-8 in it is escaped, so that it can be written into JSON and parquet."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def walk(root: Path, extensions: frozenset[str]) -> list[str]:
    """POSIX paths, relative to `root` and sorted, of all files below it with one of the extensions.

    Hidden files and folders are left out. Linked folders are entered, unless they lead back to one they lie in.
    """
    found: list[str] = []

    def enter(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    enter(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
                elif os.path.splitext(entry.name)[1].lower() in extensions:
                    found.append(prefix + entry.name)

    enter(root, "", frozenset())
    return sorted(found)
