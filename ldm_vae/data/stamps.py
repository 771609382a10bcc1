"""Stamps of images from file-system metadata: an equal stamp means that an image was not replaced since it was read.

A stamp holds inode, size, mtime and ctime of the file that an image lies in, and its place there. An equal stamp means
equal bytes: mtime can be set by `touch -d`, `cp -p` and `rsync -a`, ctime by nobody. A different one means doubt and
no more (the file was copied, touched, renamed): then the bytes have to be read.

A file that changed within the last two seconds has no stamp yet: it may change again within one tick of its clock (git
calls that racily clean, Documentation/technical/racy-git.txt; FAT counts in steps of 2 s).

Legend: n images.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ldm_vae.data.source import each_key

SETTLED = 2 * 10**9  # nanoseconds after which a file that changes again is seen to have changed
SECOND = 10**9
CHUNK = 1024  # images per task of a thread
THREADS = 16
SLOW = (
    10**5
)  # nanoseconds an image: a stat that waits for a server; of local ones (7 microseconds) threads make no more

Stamps = npt.NDArray[np.uint64]
Sizes = npt.NDArray[np.int64]


class Facts(NamedTuple):
    """Facts about an image that was not read."""

    size: int
    """Its bytes as the source holds it, -1 where only reading tells."""
    changed: int
    """When its file last changed, nanoseconds since 1970."""
    identity: tuple[int, ...]
    """Inode, size, mtime and ctime of the file, and the place of the image in it."""


@runtime_checkable
class Stamped(Protocol):
    """A source that can tell of its images without reading them. One that cannot is read wherever there is doubt."""

    def facts(self, index: int) -> Facts | None:
        """Facts of the image as it is now; None when nothing can be said."""


def file_facts(path: str | os.PathLike[str], place: Sequence[int] = (), size: int | None = None) -> Facts | None:
    """Facts of an image in a file: the whole file, or `size` bytes of it (-1: nobody knows) at a `place`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or (status.st_ctime_ns % SECOND == 0 and _read_only(path)):
            return None
    except (OSError, ValueError):
        return None
    identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, *place)
    return Facts(status.st_size if size is None else size, max(status.st_mtime_ns, status.st_ctime_ns), identity)


def url_facts(said: Mapping[str, Any], place: Sequence[int] = (), size: int | None = None) -> Facts | None:
    """Facts of an image in a file at a URL, of which its file system says this (`fsspec_files.told`); None where that
    is no version of the content."""
    from ldm_vae.core.fsspec_files import version_of  # fsspec, which files have no need of

    if (version := version_of(said)) is None:
        return None
    whole = int(said.get("size") or -1)
    number = int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "little")
    # of a content, not of a time: it needs no moment to settle
    return Facts(whole if size is None else size, 0, (number, whole, *place))


def told_facts(url: str, place: Sequence[int] = (), size: int | None = None) -> Facts | None:
    """As `url_facts`, of what the file system says now: one request."""
    from ldm_vae.core import fsspec_files  # fsspec, which files have no need of

    try:
        return url_facts(fsspec_files.told(url), place, size)
    except fsspec_files.AbsentError:
        return None


def _read_only(path: str | os.PathLike[str]) -> bool:
    """Images of file systems (squashfs, ISO 9660) are built with any whole seconds one likes, such as 0 for all files:
    a second one that is mounted in the place of the first gives files of the same inodes and times."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def stamp(facts: Facts | None, now: int) -> int:
    """The stamp as a number, 0 where there is none: nothing is known, or the file changed a moment before `now`."""
    if facts is None or facts.changed > now - SETTLED:
        return 0
    return hash(facts.identity) % 2**64  # of integers: xxHash's mixing, the same in every process; 0.1 microseconds


def stamp_now(source: object, index: int) -> int:
    """The stamp of one image; taken before it is read, it belongs to the bytes that are read."""
    return stamp(source.facts(index), time.time_ns()) if isinstance(source, Stamped) else 0


def stamps_of(source: Any, chunks: Iterator[Sequence[int]]) -> Iterator[tuple[Sequence[int], Stamps, Sizes]]:
    """(indices, their stamps, their sizes or -1) of each of `chunks`, in order; nothing is read."""
    if not isinstance(source, Stamped):
        for indices in chunks:
            yield indices, np.zeros(len(indices), np.uint64), np.full(len(indices), -1, np.int64)
        return
    found = source.facts

    def look(indices: Sequence[int]) -> tuple[Sequence[int], Stamps, Sizes]:
        now = time.time_ns()
        facts = [found(index) for index in indices]
        stamps = np.array([stamp(each, now) for each in facts], dtype=np.uint64)
        return indices, stamps, np.array([-1 if each is None else each.size for each in facts], dtype=np.int64)

    for indices in chunks:
        begun = time.monotonic_ns()
        found_here = look(indices)
        slow = time.monotonic_ns() - begun > SLOW * len(indices)
        yield found_here
        if slow:
            break
    with ThreadPoolExecutor(THREADS, "stat") as threads:
        yield from threads.map(look, chunks)


def key_numbers(source: Any) -> Stamps:
    """The first 8 bytes of a hash of each key, in the order of the source."""
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in each_key(source)
    )
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def chunks_of(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Consecutive pieces of CHUNK."""
    return (indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK))
