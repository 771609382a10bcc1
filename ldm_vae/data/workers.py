"""Worker processes of every loader: torch's DataLoader, guarded against what it can do to a long run.

One thread a worker (torch sets it), the global random generator untouched, signals left to the main process, errors for
users carried across as sentences.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ldm_vae.core.errors import WorkError, environment_failure

GRACE = 5.0  # seconds: see `_take`


class _Failure:
    """A WorkError on its way out of a worker: raised there it would arrive as a traceback in a string."""

    def __init__(self, error: WorkError) -> None:
        self.error = str(error)


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, tasks: Any) -> Any:
        try:
            return self.dataset.__getitems__(tasks)
        except WorkError as error:
            return _Failure(error)


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
        WorkError: a worker raised one, or died.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=tasks,
        collate_fn=_same,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=context if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without one of its own it draws from the global generator
    )
    # `next` by hand, so that only its own errors are caught below
    batches = iter(loader)
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
            raise WorkError(batch.error)
        yield batch


def _take(batches: Iterator[Any]) -> Any:
    """The next batch of worker processes.

    The tensors of a batch are asked of the worker that has them: of one that was just killed the connection breaks, and
    torch's signal handler says so (a RuntimeError out of the wait) only when the kernel has told it."""
    try:
        return next(batches)
    except (EOFError, ConnectionError) as error:
        if "DataLoader worker process" in str(error):  # a worker's own error, of the network perhaps, on its way to us
            raise
        # time for torch's signal handler, whose RuntimeError names the worker and is the better sentence
        time.sleep(GRACE)
        raise WorkError(f"a data worker died, out of memory perhaps (dataloader_num_workers): {error}") from error
