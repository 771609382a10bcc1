"""Publishing a file: complete or not there at all, whatever is killed, and never two writers in one file.

A file is written beside its final name under a temporary one that no other process shares, fsynced, then linked to
the final name *if that is absent*. A process that lost the race (an orphan of a killed launcher, a second launch by
mistake) finds the name taken and throws its copy away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ldm_vae.errors import WorkError

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process and no other machine will choose."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether `path` is something that a writer left when it was killed."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


@contextlib.contextmanager
def _written(path: Path, write: Callable[[BinaryIO], None]) -> Iterator[Path]:
    """The temporary file, on disk; it is gone when the block ends, unless it was renamed."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write `path` so that a reader sees the old file or the new one, and nothing between."""
    with _written(path, write) as temporary:
        os.replace(temporary, path)
        sync_folder(path.parent)


def create(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Write `path` if it is absent; False, and nothing changed, if another process was first."""
    with _written(path, write) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            if path.exists():  # a file system without hard links: the check and the rename are two steps there
                return False
            os.replace(temporary, path)
        sync_folder(path.parent)
    return True


def data(content: bytes) -> Callable[[BinaryIO], None]:
    """What `replace` and `create` take, for content that is ready."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> WorkError:
    """The sentence for a file that cannot be written."""
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is larger than is allowed here",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
    }.get(error.errno or 0, error.strerror or str(error))
    return WorkError(
        f"{path}: cannot be written: {reason}; what was finished is kept, the same command goes on from there"
    )
