"""Errors and exit statuses of the programs: a failure is one sentence on stderr, never a traceback.

0 done; 1 the work failed; 2 the call was wrong; 130 / 143 stopped by SIGINT / SIGTERM after saving; 141 nobody reads
what it prints.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

WORKERS_HELP = (
    "with 0 workers (dataloader_num_workers, --num_workers) the main process reads the data itself; those that run out "
    "of memory need more of it, or of /dev/shm (a container's --shm-size)"
)


class UsageError(ValueError):
    """The call was wrong: the sentence names the argument or field, what was expected, what came and what exists."""


class WorkError(RuntimeError):
    """The call was right and the work failed: the sentence says what happened and what is left."""


class Stopped(SystemExit):
    """SIGTERM or SIGINT arrived, the state was saved; the exit status says which (143 or 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a program's `main` and exit with the status that its outcome stands for."""
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        _leave(2, error)
    except WorkError as error:
        _leave(1, error)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if (module := _who_left(stop)) is None:
            raise
        _leave(1, WorkError(f"{module} left the program with sys.exit({stop.code!r}) before it was done"))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)
        if (what := environment_failure(error)) is None:
            raise  # a mistake of ours: the traceback tells where
        _leave(1, what)
    sys.exit(0)


def _who_left(stop: SystemExit) -> str | None:
    """The module that raised it, unless it is this toolkit or a parser of command lines: a module of the user's own,
    whose exit status 0 would say that the work is done."""
    *_, (frame, _) = traceback.walk_tb(stop.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    return None if module.partition(".")[0] in ("__main__", "ldm_vae", "train", "eval", "argparse", "tyro") else module


def _leave(status: int, error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def _nobody_reads() -> bool:
    """True when stdout has lost its reader, as behind `| head`, which is no error."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if gone := any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on its way out
    return gone


# --- failures of the environment --------------------------------------------------------------------------------------


def environment_failure(error: Exception) -> WorkError | None:
    """Map a failure of the environment (disk, memory, a dead worker) to WorkError; None for any other error.

    A file that cannot be read or written, memory that is used up, a killed data worker (torch raises that out
    of a signal handler, at any point of the program), a process of the same launch that is gone or silent.
    Recognised by its words where torch has no class for it; nothing is imported, since `--help` has no torch.
    """
    kind, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError) or kind == "SafetensorError":  # as which safetensors reports a full disk
        return WorkError(said)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return WorkError(f"out of memory{f': {said}' if said else ''}")
    if not isinstance(error, RuntimeError):
        return None
    if "DataLoader worker" in said:
        return WorkError(f"a data worker died: {said}; {WORKERS_HELP}")
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError") or "/gloo/" in said:
        silent = "imed out" in said or "imeout" in said
        what = "does not answer (ddp_timeout)" if silent else "died"
        return WorkError(f"another process of this launch {what}; what was saved is kept, the same command goes on")
    return None
