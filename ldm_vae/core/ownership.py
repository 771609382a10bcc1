"""Ownership: one job at a time writes a folder, whatever is started twice, on one machine or on several.

Two marks, both from the package filelock. `.lock` is the system's own lock: it excludes a second writer wherever the
file system has locks, and the system takes it from a process that ends, whichever way. `.owner` is a lease: a record
that its holder touches every 20 s. It excludes a second writer where a file system has no locks, or where they count
on one machine only (many network file systems): whoever finds a record that has not been touched for 60 s takes it
over. The first holder may only have been suspended, so it checks that the record is still its own before it publishes.

A third file, MARK, stays: a walk over a data set leaves out folders that hold it, so that no output becomes data.

The processes of one job share its ownership: process 0 owns the folder, the others join it. What they hold keeps a new
job out until the last of them has ended, an orphan of a killed launcher as well.
"""

from __future__ import annotations

import contextlib
import errno
import mimetypes
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, LeaseSettingsMismatch, SoftFileLease, Timeout

from ldm_vae.core.errors import UsageError, WorkError

LOCK, LEASE = ".lock", ".owner"
MARK = ".ldm-vae"
WAIT_SECONDS = 30.0  # seconds: a killed process may take a while to end (torch's data workers look for it every 5 s)
LEASE_SECONDS = 60.0  # twice what network file systems cache of a folder by default; renewed every third of it
ATTEMPTS = 100
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what such file systems answer

_held: dict[tuple[str, int], str] = {}  # (folder, thread): a thread cannot wait for itself


@dataclass(frozen=True)
class Ownership:
    """A job's hold on a folder, as each of its processes sees it."""

    what: str
    """The folder as messages name it: `OUT my-latents`."""
    lease: Path
    record: bytes | None
    """The lease's content, which names its holder; None while the folder has no owner, only processes that joined."""

    def check(self) -> None:
        """Make sure that the folder is still this job's. Costs the reading of one small file.

        Raises:
            WorkError: another job has taken it over.
        """
        for pause in (0.0, 0.2, 0.0):  # a contender that gives up has moved the record aside for a moment
            if _read(self.lease) == self.record:
                return
            time.sleep(pause)
        raise WorkError(
            f"{self.what}: another launch has taken it over, since this one did not answer for {LEASE_SECONDS:.0f} s; "
            "what was finished is kept, the same command goes on from there when the other has ended"
        )


@contextlib.contextmanager
def own(folder: Path, field: str) -> Iterator[Ownership]:
    """Own `folder` while the block runs; it is made if it is absent. MARK alone is left in it afterwards, and of a
    folder that was made and stayed empty nothing at all.

    Args:
        field: the name of the folder's argument, for messages.

    Raises:
        UsageError: another job is at work on it, and still is after 30 s; or it holds images of somebody else, among
            which those that are written would be lost.
        WorkError: it cannot be written.
    """
    what = f"{field} {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{what}: expected a folder, got a file")
    check_no_images(folder, what)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        # registered first, so it runs last, after the marks in the folder are gone
        stack.callback(_remove_empty, made)
        owner = _entered(stack, lambda: _owned(folder / LOCK, folder / LEASE, what), folder, f"{what}: cannot be made")
        stack.enter_context(_marked(folder))
        yield owner


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """`mark` from the beginning, so that a killed job leaves it; taken away where nothing else has been added."""
    before = {path.name for path in folder.iterdir()}
    mark(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if MARK not in before and {path.name for path in folder.iterdir() if not is_mark(path)} <= before:
                (folder / MARK).unlink()


def mark(folder: Path) -> None:
    """Say that this toolkit writes the files of `folder`."""
    if not (folder / MARK).exists():
        (folder / MARK).write_text("Written by ldm-vae; a folder with this file is left out of data sets.\n")


def check_no_images(folder: Path, what: str) -> None:
    """Raise UsageError where images lie in `folder` that are not this toolkit's."""
    if folder.is_dir() and not (folder / MARK).exists():
        kinds = ((path.name, mimetypes.guess_type(path.name)[0] or "") for path in sorted(folder.iterdir()))
        image = next((name for name, kind in kinds if kind.startswith("image/")), None)
        if image is not None:
            raise UsageError(f"{what}: holds images of another origin ({image}); expected a new or an empty folder")


@contextlib.contextmanager
def own_name(out: Path, field: str = "OUT") -> Iterator[Ownership]:
    """Own the name `out`, which a finished folder or file is to get: the marks lie beside it. As `own` otherwise."""
    out = out.absolute()
    what = f"{field} {out}"
    lock, lease = out.with_name(f".{out.name}{LOCK}"), out.with_name(f".{out.name}{LEASE}")
    with contextlib.ExitStack() as stack:
        yield _entered(stack, lambda: _owned(lock, lease, what), out.parent, f"{what}: cannot be written")


@contextlib.contextmanager
def own_together(folder: Path, field: str, rank: int, barrier: Callable[[], None]) -> Iterator[Ownership]:
    """Own `folder` with all processes of a launch: process 0 takes it, the others join at the barrier. As `own`.

    A process that joins where nobody is the owner (each process of the launch is started by itself) keeps owners out
    while it works.
    """
    if rank == 0:
        # owned before the barrier: a process that joins finds the lease, and knows whose it is
        with own(folder, field) as ownership:
            barrier()
            yield ownership
    else:
        barrier()
        with contextlib.ExitStack() as stack:
            what = f"{field} {folder}"
            yield _entered(stack, lambda: _joined(folder, rank, what), folder, f"{what}: cannot be made")


def is_mark(path: Path) -> bool:
    """True when `path` is a mark of ownership, perhaps of a process that was killed, or MARK."""
    name = path.name
    owned = name.endswith((LOCK, LEASE)) or f"{LOCK}." in name or f"{LEASE}." in name
    return name == MARK or (name.startswith(".") and owned)


def _entered(
    stack: contextlib.ExitStack, ways: Callable[[], AbstractContextManager[Ownership]], folder: Path, failing: str
) -> Ownership:
    """Make the folder and enter the context; a job that was waited for may have removed the folder at its end, so this
    is tried again."""
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkError(f"{failing}: {error.strerror or error}") from error
        try:
            return stack.enter_context(ways())
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                raise WorkError(f"{failing}: {error.strerror or error}") from error
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _joined(folder: Path, member: int, what: str) -> Iterator[Ownership]:
    with _locked(folder / f"{LOCK}.{member}", what):
        yield Ownership(what, folder / LEASE, _read(folder / LEASE))


@contextlib.contextmanager
def _owned(lock: Path, lease: Path, what: str) -> Iterator[Ownership]:
    with _locked(lock, what):
        # orphans of a killed job hold their own locks for the moments until they notice
        for left in lock.parent.glob(f"{lock.name}.*"):
            with _locked(left, what):
                pass
        # the lock first: where locks work, a live owner is met there, and a lease that is left has lost its owner
        claim = SoftFileLease(lease, lease_duration=LEASE_SECONDS, thread_local=False)
        _acquire(claim, LEASE_SECONDS + WAIT_SECONDS / 2, what)
        try:
            yield Ownership(what, lease, _read(lease))
        finally:
            claim.release()


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock. Its file is deleted while the lock is still held: a waiter sees that and takes a new one."""
    me = (str(path.absolute()), threading.get_ident())
    if me in _held:
        # waiting would never end: the holder is this very thread
        raise _refusal(what)
    lock = FileLock(path, fallback_to_soft=False)
    _held[me] = what
    try:
        try:
            _acquire(lock, WAIT_SECONDS, what)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield
    finally:
        del _held[me]
        if lock.is_locked:
            with contextlib.suppress(OSError):  # gone with its folder, or Windows, where it stays
                path.unlink()
            lock.release()


def _acquire(lock: BaseFileLock, patience: float, what: str) -> None:
    try:
        # without waiting first, so that the sentence below appears only when there is something to wait for
        lock.acquire(timeout=0)
    except (Timeout, LeaseSettingsMismatch):
        print(f"{what}: another launch is at work on it; waiting up to {patience:.0f} s for its end", file=sys.stderr)
        try:
            lock.acquire(timeout=patience)
        except (Timeout, LeaseSettingsMismatch) as error:  # the second: another version of ours, with other seconds
            raise _refusal(what) from error


def _remove_empty(folders: Iterable[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # not empty: the work's
            path.rmdir()


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"{what}: expected that no other launch is at work on it, and one is; wait for its end, or name another place"
    )


def _read(lease: Path) -> bytes | None:
    try:
        return lease.read_bytes()
    except FileNotFoundError:
        return None
