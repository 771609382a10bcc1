"""Worker processes of every loader: torch's DataLoader, guarded against what it can do to a long run.

One thread a worker (torch sets it), the global random generator untouched, signals left to the main process, every
error of a worker carried across as one sentence.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldm_vae.core.errors import WORKERS_HELP, UsageError, WorkError, environment_failure
from ldm_vae.core.parent_process import is_gone
from ldm_vae.core.validation import first_line

GRACE = 5.0  # seconds: see `_take`


class _Parcel:
    """Content that is pickled here and now. The thread that sends a queue's objects drops one that it cannot pickle (no
    shared memory left, no file descriptor, a class of a function), and who waits for it waits for ever."""

    def __init__(self, content: Any) -> None:
        self._bytes = ForkingPickler.dumps(content).tobytes()

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return ForkingPickler.loads, (self._bytes,)


class _Failure:
    """An error on its way out of a worker, whatever it is: raised there it would arrive as a traceback in a string, or
    not at all."""

    def __init__(self, what: str, error: BaseException) -> None:
        self.error: UsageError | WorkError
        if isinstance(error, UsageError | WorkError):
            self.error = (UsageError if isinstance(error, UsageError) else WorkError)(str(error))
        else:
            self.error = _failure(what, error)


def _failure(what: str, error: BaseException) -> WorkError:
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    where = f"{Path(frame.f_code.co_filename).name}:{line}"
    return WorkError(f"{what}: {type(error).__name__}: {first_line(error)} ({where}); {WORKERS_HELP}")


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, tasks: Any) -> Any:
        if get_worker_info() is None:
            return self.dataset.__getitems__(tasks)
        if isinstance(tasks, _Failure):
            return tasks
        try:
            return _Parcel(self.dataset.__getitems__(tasks))
        except BaseException as error:  # SystemExit too: a worker that has left has said nothing
            return _Failure("a data worker failed", error)


def _parcels(tasks: Iterable[Any]) -> Iterator[Any]:
    try:
        for work in tasks:
            yield _Parcel(work)
    except Exception as error:  # by way of a worker, after the batches before it
        yield _Failure("work for a data worker failed", error)


def _same(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's SIGTERM, which reach the whole process group; the main process saves first and
    then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # a spawned worker that ends while its queue's thread is inside torch aborts the process and frightens the parent
    atexit.register(os._exit, 0)
    sys.excepthook = _excepthook
    # torch looks for the main process between batches only: a worker that waits inside one, killed main process or not,
    # stays and holds what it has inherited, the lock of a run among it
    threading.Thread(target=_leave_with_the_main_process, daemon=True).start()


def _leave_with_the_main_process() -> None:
    while not is_gone():
        time.sleep(1.0)
    os._exit(0)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook of a worker's other threads (errors of the loop itself travel): that the main process left while
    it took a batch, which multiprocessing reports with a traceback, is no news; it has said why."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def load(
    dataset: Any,
    tasks: Iterable[Any],
    num_workers: int,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    context: str | None = None,
) -> Iterator[Any]:
    """`dataset.__getitems__(work)` for each of `tasks`, in order.

    Raises:
        UsageError: a worker raised one.
        WorkError: a worker failed in any other way, died, or could not be started.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=_parcels(tasks) if num_workers else tasks,
        collate_fn=_same,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=context if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without one of its own it draws from the global generator
    )
    try:
        batches = iter(loader)
    except Exception as error:  # a spawned worker is sent the dataset, pickled
        raise _failure("data workers cannot be started", error) from error
    # `next` by hand, so that only its own errors are caught below
    try:
        while True:
            try:
                batch = _take(batches) if num_workers else next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if (what := environment_failure(error)) is None:
                    raise
                raise what from error
            # raised here, in the main process, as the sentence that it is
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    finally:
        # workers end here: collected later, together with its queues, it waits 10 s for workers that it cannot tell
        del batches


def _take(batches: Iterator[Any]) -> Any:
    """The next batch of worker processes.

    The tensors of a batch are asked of the worker that has them: of one that was just killed the connection breaks, and
    torch's signal handler says so (a RuntimeError out of the wait) only when the kernel has told it."""
    try:
        return next(batches)
    except (EOFError, ConnectionError) as error:
        # time for torch's signal handler, whose RuntimeError names the worker and is the better sentence
        time.sleep(GRACE)
        raise _failure("a data worker died", error) from error
