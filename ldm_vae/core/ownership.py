"""Ownership: one job at a time writes a folder, whatever is started twice, on one machine or on several.

Two marks, both from the package filelock. `.lock` is the system's own lock: it excludes a second writer wherever the
file system has locks, and the system takes it from a process that ends, whichever way. `.owner` is a lease: a record
that its holder touches every 20 s. It excludes a second writer where a file system has no locks, or where they count
on one machine only (many network file systems): whoever finds a record that has not been touched for 60 s takes it
over. The first holder may only have been suspended, so it checks that the record is still its own before it publishes.

A third file, MARK, stays: a walk over a data set leaves out folders that hold it, so that no output becomes data.

The processes of one job share its ownership: process 0 owns the folder, the others join it. What they hold keeps a new
job out until the last of them has ended, an orphan of a killed launcher as well. Parts of one job that do not
communicate (tasks of an array) own a part each, with marks of its own beside those of the other parts. While any part
is at work nobody owns the whole, and parts of another number wait. What one alone may do, a part does in its turn.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mimetypes
import os
import re
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
TURN = ".turn"  # end of the marks of the part that is at something which one alone may do
MARK = ".ldm-vae"
WAIT_SECONDS = 30.0  # seconds: a killed process may take a while to end (torch's data workers look for it every 5 s)
LEASE_SECONDS = 60.0  # twice what network file systems cache of a folder by default; renewed every third of it
ATTEMPTS = 100
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what such file systems answer

_held: dict[tuple[str, int], str] = {}  # (folder, thread): a thread cannot wait for itself


@dataclass(frozen=True)
class Part:
    """Part `index`, from 1, of the `count` that share a job without communication; of 1, the whole."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, field: str) -> Part:
        """`2/8` => part 2 of 8. Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"{field}: expected I/N with I from 1 to N, as in 2/8, got {text}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_whole(self) -> bool:
        """True where there is no other part."""
        return self.count == 1

    @property
    def suffix(self) -> str:
        """End of the names of its marks."""
        return "" if self.is_whole else f".{self.index}-of-{self.count}"

    def shares(self, mark: Path) -> bool:
        """True for a mark of this job's parts (or of their processes), and of their turn."""
        return mark.name.endswith(TURN) or re.search(rf"\.[0-9]+-of-{self.count}(\.[0-9]+)?$", mark.name) is not None


WHOLE = Part(1, 1)


@dataclass(frozen=True)
class Ownership:
    """A job's hold on a folder, as each of its processes sees it."""

    what: str
    """The folder as messages name it: `OUT my-latents`."""
    lease: Path
    record: bytes | None
    """The lease's content, which names its holder; None while the folder has no owner, only processes that joined."""
    part: Part = WHOLE

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
    def turn(self) -> Iterator[None]:
        """Do what one alone may do at a time: the owner of the whole at once, a part after the others' turns."""
        if self.part.is_whole:
            yield
        else:
            folder, what = self.lease.parent, f"{self.what}, one part at a time"
            with _owned(folder / f"{LOCK}{TURN}", folder / f"{LEASE}{TURN}", what, patience=math.inf):
                yield


@contextlib.contextmanager
def own(folder: Path, field: str, part: Part = WHOLE) -> Iterator[Ownership]:
    """Own `folder` while the block runs; it is made if it is absent. MARK alone is left in it afterwards, and of a
    folder that was made and stayed empty nothing at all.

    Args:
        field: the name of the folder's argument, for messages.
        part: own this part alone, beside the owners of the others.

    Raises:
        UsageError: another job is at work on it, and still is after 30 s; or it holds images of somebody else.
        WorkError: it cannot be written.
    """
    what = f"{field} {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{what}: expected a folder, got a file")
    check_no_images(folder, what)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)  # first, so it runs last, after the marks in the folder are gone
        owner = _entered(stack, lambda: _taken(folder, part, what), folder, f"{what}: cannot be made")
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
def own_together(
    folder: Path, field: str, rank: int, barrier: Callable[[], None], part: Part = WHOLE
) -> Iterator[Ownership]:
    """Own `folder`, or a part, with a whole launch: process 0 takes it, the others join at the barrier. As `own`.

    A process that joins where nobody is the owner (each is started by itself) keeps owners out while it works.
    """
    if rank == 0:
        # owned before the barrier: a process that joins finds the lease, and knows whose it is
        with own(folder, field, part) as ownership:
            barrier()
            yield ownership
    else:
        barrier()
        with contextlib.ExitStack() as stack:
            what = f"{field} {folder}"
            yield _entered(stack, lambda: _joined(folder, rank, part, what), folder, f"{what}: cannot be made")


def is_mark(path: Path) -> bool:
    """True when `path` is a mark of ownership, perhaps of a process that was killed, or MARK."""
    name = path.name
    owned = name.endswith((LOCK, LEASE)) or f"{LOCK}." in name or f"{LEASE}." in name
    return name == MARK or (name.startswith(".") and owned)


def _entered(
    stack: contextlib.ExitStack, ways: Callable[[], AbstractContextManager[Ownership]], folder: Path, failing: str
) -> Ownership:
    """Make the folder and enter the context; again where a job that was waited for has removed the folder."""
    if re.match(r"[a-z0-9]+:/", str(folder)):
        raise UsageError(f"{failing}: a URL takes a latent store alone (`ldm-vae encode`, `ldm-vae store merge`)")
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
def _joined(folder: Path, member: int, part: Part, what: str) -> Iterator[Ownership]:
    lease = folder / f"{LEASE}{part.suffix}"
    with _locked(folder / f"{LOCK}{part.suffix}.{member}", what):
        yield Ownership(what, lease, _read(lease), part)


@contextlib.contextmanager
def _taken(folder: Path, part: Part, what: str) -> Iterator[Ownership]:
    with contextlib.ExitStack() as own_marks:
        with _owned(folder / LOCK, folder / LEASE, what, beside=part) as whole:
            if part.is_whole:
                yield whole
                return
            # The whole is owned for the moment in which the part's marks are made: whoever wants the whole from here on
            # meets them.
            what += f", part {part}"
            lease = folder / f"{LEASE}{part.suffix}"
            owned = own_marks.enter_context(_owned(folder / f"{LOCK}{part.suffix}", lease, what))
        yield Ownership(what, lease, owned.record, part)


@contextlib.contextmanager
def _owned(
    lock: Path, lease: Path, what: str, *, beside: Part = WHOLE, patience: float | None = None
) -> Iterator[Ownership]:
    """Hold both marks, while no process of an earlier job and no part, but for those `beside`, has any."""

    def others(mark: Path) -> list[Path]:
        return [path for path in mark.parent.glob(f"{mark.name}.*") if beside.is_whole or not beside.shares(path)]

    # parts that start together take a moment each, of which nothing need be said
    with _locked(lock, what, patience, quiet=0.0 if beside.is_whole else WAIT_SECONDS / 2):
        # orphans of a killed job hold their own locks for the moments until they notice
        for left in others(lock):
            with _locked(left, what):
                pass
        # the lock first: where locks work, a live owner is met there, and a lease that is left has lost its owner
        for left in others(lease):
            if re.search(r"-of-[0-9]+$", left.name):  # filelock's own passing names lie there too
                with _leased(left, what):
                    pass
        with _leased(lease, what, patience):
            yield Ownership(what, lease, _read(lease))


@contextlib.contextmanager
def _leased(lease: Path, what: str, patience: float | None = None) -> Iterator[None]:
    _close_empty(lease)
    claim = SoftFileLease(lease, lease_duration=LEASE_SECONDS, thread_local=False)
    _acquire(claim, LEASE_SECONDS + WAIT_SECONDS / 2 if patience is None else patience, what)
    try:
        yield
    finally:
        claim.release()


def _close_empty(lease: Path) -> None:
    """End the line of an empty record, which filelock never takes over: its process was killed before it wrote it. One
    that is cut off is taken over after 2 s; a process that was only interrupted writes over the line end."""
    with contextlib.suppress(OSError):
        if lease.stat().st_size == 0:
            # never made here: the name may be free by now
            with open(lease, "ab", opener=lambda path, flags: os.open(path, flags & ~os.O_CREAT)) as file:
                file.write(b"\n")


@contextlib.contextmanager
def _locked(path: Path, what: str, patience: float | None = None, quiet: float = 0.0) -> Iterator[None]:
    """Hold the lock. Its file is deleted while the lock is still held: a waiter sees that and takes a new one."""
    me = (str(path.absolute()), threading.get_ident())
    if me in _held:
        # waiting would never end: the holder is this very thread
        raise refusal(what)
    lock = FileLock(path, fallback_to_soft=False)
    _held[me] = what
    try:
        try:
            _acquire(lock, WAIT_SECONDS if patience is None else patience, what, quiet)
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


def _acquire(lock: BaseFileLock, patience: float, what: str, quiet: float = 0.0) -> None:
    try:
        # almost without waiting first, so that the sentence below appears only when there is something to wait for
        lock.acquire(timeout=quiet)
    except (Timeout, LeaseSettingsMismatch):
        limit = "" if patience == math.inf else f" up to {patience:.0f} s"
        print(f"{what}: another launch is at work on it; waiting{limit} for its end", file=sys.stderr)
        try:
            lock.acquire(timeout=-1 if patience == math.inf else patience)
        except (Timeout, LeaseSettingsMismatch) as error:  # the second: another version of ours, with other seconds
            raise refusal(what) from error


def _remove_empty(folders: Iterable[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # not empty: the work's
            path.rmdir()


def refusal(what: str) -> UsageError:
    """The error where another launch is at work, and stays."""
    return UsageError(
        f"{what}: expected that no other launch is at work on it, and one is; wait for its end, or name another place"
    )


def _read(lease: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return lease.read_bytes().rstrip()  # a contender may have ended its line, see `_close_empty`
    return None
