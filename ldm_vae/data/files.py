"""Image files: reading them, and long lists of their names.

Legend: N files.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.core import files
from ldm_vae.core.errors import UsageError
from ldm_vae.data.quarantine import BadImage

MAX_BYTES = 2**30  # a larger "image" is a disk image under a wrong name


def is_url(path: str | os.PathLike[str]) -> bool:
    """True for a URL, which is read through fsspec."""
    return isinstance(path, str) and "://" in path


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file or a URL. Raises BadImage when it cannot be read, is no plain file (a FIFO would hang) or is
    enormous; WorkError where a server does not answer, which says nothing of the image."""
    if is_url(path):
        return _from_url(lambda files: files.read(str(path)))
    try:
        return files.read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BadImage(reason_of(error)) from error


def read_range(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """`size` bytes of a file or a URL. Raises as `read_bytes`, and BadImage when there are fewer, or more than
    MAX_BYTES are asked for."""
    if size > MAX_BYTES:
        raise BadImage(f"a member of {size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:.0f}")
    if is_url(path):
        data = _from_url(lambda files: files.read_range(str(path), offset, offset + size))
        if len(data) < size:
            raise BadImage("the archive is cut off here")
        return data
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
    except (OSError, ValueError, OverflowError) as error:
        raise BadImage(reason_of(error)) from error
    if len(data) < size:
        raise BadImage("the archive is cut off here")
    return data


def _from_url(read: Callable[[Any], bytes]) -> bytes:
    from ldm_vae.core import fsspec_files  # fsspec, which files have no need of

    try:
        return read(fsspec_files)
    except fsspec_files.AbsentError as error:
        raise BadImage("no such file (it vanished, or never was)") from error


def check_member_name(name: str) -> None:
    """Raise BadImage for a member of an archive whose name would climb out of the folder it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        raise BadImage("its name climbs out of the archive")


def reason_of(error: OSError | ValueError | OverflowError) -> str:
    """The reason for the quarantine of a file that cannot be read."""
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

    def repeated(self) -> str | None:
        """A name that is there twice, None if there is none."""
        return repeated(np.fromiter((hash(name) for name in self), dtype=np.int64, count=len(self)), self.__getitem__)


def repeated(hashes: npt.NDArray[np.int64], name_of: Callable[[int], str]) -> str | None:
    """A name that is there twice, None if there is none; of equal hashes alone are the names asked for."""
    values, counts = np.unique(hashes, return_counts=True)
    found = Counter(name_of(index) for index in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist())
    return next((name for name, count in found.items() if count > 1), None)


def check_unique(names: Names, data: str, hint: str) -> None:
    """Raise UsageError for a key that two images have."""
    name = names.repeated()
    if name is not None:
        raise UsageError(f"data {data}: expected keys that differ, got {printable(name)} twice: {hint}")


def normal(name: str) -> str:
    """A path in an archive or a table, as all of them have it: `/` between folders, composed characters (NFC)."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def printable(name: str) -> str:
    """A file name as a key: what is not UTF-8 in it is escaped, so that it can be written into JSON and parquet."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
