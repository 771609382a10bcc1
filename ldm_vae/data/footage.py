"""Footage: a video or a sound where it lies (a file, a part of one, bytes, a folder's frames), opened only when its
frames are wanted, and what is known about it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import IO, Any

from ldm_vae.core.files import open_plain
from ldm_vae.data.files import read_bytes, reason_of
from ldm_vae.data.quarantine import BadImage

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset({
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".asf", ".flv"),
    *(".ogv", ".3gp", ".mxf", ".vob", ".ivf", ".y4m", ".h264", ".h265", ".hevc", ".nut"),
})  # fmt: skip
SOUNDS = frozenset({
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".au", ".caf", ".w64"),
    *(".rf64", ".wma", ".mka", ".ac3", ".amr", ".ape", ".wv"),
})  # fmt: skip
PIECE = 2**20  # bytes that are read at a time for a checksum


def is_footage(name: str) -> bool:
    """True for the name of a file that is opened only when it is wanted: of a video or a sound."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS | SOUNDS


@dataclass(frozen=True)
class Video:
    """A video or a sound that nobody has read yet.

    content: bytes of a file; the path of one, of which it is `size` bytes (None: all) from `offset` on; or the paths of
    the frames, in order. start: of the clip that is meant, in seconds (in frames where these are files); None leaves it
    to who decodes.
    """

    content: bytes | str | tuple[str, ...]
    offset: int = 0
    size: int | None = None
    start: Fraction | None = None

    def open(self) -> IO[bytes]:
        """The file, for reading and seeking. Raises BadImage when it is not there, or no plain file."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        assert isinstance(self.content, str)
        try:
            file = open_plain(self.content)
            return file if self.size is None else _Part(file, self.offset, self.size)  # type: ignore[return-value]
        except (OSError, ValueError) as error:
            raise BadImage(reason_of(error)) from error

    @property
    def place(self) -> tuple[int, ...] | None:
        """Inode, size and times of its file, another one when that is replaced; None of bytes."""
        if not isinstance(self.content, str):
            return None
        try:
            status = os.stat(self.content)
        except (OSError, ValueError):
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @property
    def bytes(self) -> int:
        """Bytes as the source holds it, 0 of a file that is not there."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if self.size is not None:
            return self.size
        paths = (self.content,) if isinstance(self.content, str) else self.content
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def checksum(self) -> str:
        """SHA-256 of the file's bytes, read in pieces; of frames that of all of theirs. Raises BadImage."""
        if isinstance(self.content, tuple):
            digest = hashlib.sha256()
            for path in self.content:
                digest.update(hashlib.sha256(read_bytes(path)).digest())
            return digest.hexdigest()
        # a long file has many clips: read once
        place = self.place
        return _digest(self) if place is None else _remembered_digest(replace(self, start=None), place)


class _Part(io.RawIOBase):
    """A member of an archive that is not compressed."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _digest(video: Video) -> str:
    digest = hashlib.sha256()
    try:
        with video.open() as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise BadImage(reason_of(error)) from error
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _remembered_digest(video: Video, _place: tuple[int, ...]) -> str:
    return _digest(video)


@dataclass(frozen=True)
class VideoFacts:
    """Facts about a video or an image from its header and its first frame: frames at `rate` (frames a second; of an
    image 1 frame), upright size, container and codec, the frame's format, and what is not read or not as it should be
    (`audio, ignored`)."""

    frames: int
    rate: Fraction
    height: int
    width: int
    format: str
    mode: str
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return float(self.frames / self.rate)


_SAID: set[tuple[str, str]] = set()


def tell(data: str, notes: Mapping[str, int]) -> None:
    """Warn, once for each source of a process, about what is not read of so many of its videos."""
    for note, count in notes.items():
        if (data, note) not in _SAID:
            _SAID.add((data, note))
            logger.warning("data %s: %d of the videos: %s", data, count, note)
