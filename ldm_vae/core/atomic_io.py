"""Atomic publication of files and folders: complete or absent, whatever is killed, and never two writers in one file.

A file is written beside its final name under a temporary one that no other process shares, fsynced, then linked to
the final name *if that is absent*. A process that lost the race (an orphan of a killed launcher, a second launch by
mistake) finds the name taken and throws its copy away.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import own_name

TOKEN = 8  # bytes
TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process and no other machine will choose."""
    return path.with_name(f".{path.name}.{secrets.token_hex(TOKEN)}{TEMPORARY_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """True for a temporary file or folder of this module, such as a killed writer leaves behind."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


@contextlib.contextmanager
def _made(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make and sync a temporary file; it is deleted when the block ends, unless it was renamed."""
    temporary = temporary_name(path)
    try:
        make(temporary)
        # content before name: after a power cut a name never stands for a file without its bytes
        sync(temporary)
        yield temporary
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write `path` so that a reader sees the old file or the new one, and nothing between."""
    replace_by(path, _writing(write))


def replace_by(path: Path, make: Callable[[Path], None]) -> None:
    """Replace `path` by means of a library that opens paths by itself: `make` is given the temporary one."""
    with _made(path, make) as temporary:
        os.replace(temporary, path)
        # the rename itself is durable only once the folder is synced
        sync(path.parent)


def create(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Write `path` if it is absent; False, and nothing changed, if another process was first."""
    with _made(path, _writing(write)) as temporary:
        try:
            # link fails where the name exists, which rename does not: two writers cannot both win
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            # these are the answers of file systems without hard links
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            if path.exists():  # a file system without hard links: the check and the rename are two steps there
                return False
            os.replace(temporary, path)
        sync(path.parent)
    return True


def _writing(write: Callable[[BinaryIO], None]) -> Callable[[Path], None]:
    def make(temporary: Path) -> None:
        with open(temporary, "xb") as file:
            write(file)

    return make


def data(content: bytes) -> Callable[[BinaryIO], None]:
    """Writer of ready content, for `replace` and `create`."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


# --- folders ----------------------------------------------------------------------------------------------------------


def beside(out: Path) -> Path:
    """Make an empty folder of a temporary name next to `out`, to be filled and then `put`."""
    folder = temporary_name(out)
    folder.mkdir(parents=True)
    return folder


def absent(out: Path) -> None:
    """Raise UsageError when `out` exists: the default check of `whole_folder`."""
    if out.exists():
        raise UsageError(f"OUT {out}: exists already; choose a new folder")


def anything(out: Path) -> None:
    """Replace whatever `out` holds: a check of `whole_folder`."""


@contextlib.contextmanager
def whole_folder(out: Path, free: Callable[[Path], None] = absent) -> Iterator[Path]:
    """Yield an empty folder that gets the name `out` when the block ends well and is deleted when it does not. The name
    is this job's meanwhile (`ownership`): of two that want it the second waits, and meets what the first has made.

    Args:
        free: raises unless the name may be taken; asked at the beginning and again before an `out` gives way.

    Raises:
        UsageError: the name is not free, or another job is still at work on it.
        WorkError: it cannot be written.
    """
    with own_name(out):
        free(out)
        folder: Path | None = None
        try:
            folder = beside(out)
            yield folder
            free(out)  # made meanwhile by somebody who knows nothing of ownership
            put(folder, out)
        except OSError as error:
            raise explained(error, out) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def put(folder: Path, out: Path) -> None:
    """Give a filled folder its name, which is this job's; an older one of that name steps aside first and is deleted
    last, with whatever killed writers of that name have left."""
    # files first, then the folder that names them, then the rename: each step is on disk before the next
    for path in folder.rglob("*"):
        if path.is_file():
            sync_readable(path)
    sync(folder)
    old = temporary_name(out)
    if out.exists():
        # between the two renames `out` is absent for a moment, never half of each
        out.rename(old)
    folder.rename(out)
    sync(out.parent)
    # safe for the owner of the name: no other writer of it is alive
    for left in out.parent.glob(f".{glob.escape(out.name)}.{'?' * 2 * TOKEN}{TEMPORARY_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def sync_readable(path: Path) -> None:
    """Sync a file and give it the permissions of the umask (safetensors writes files that only their owner may
    read)."""
    # Python cannot read the umask without setting it
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync(path)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> WorkError:
    """The WorkError that says in a sentence why a file cannot be written."""
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
