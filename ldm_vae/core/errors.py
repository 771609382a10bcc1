"""Errors and exit statuses of the programs: a failure is one sentence on stderr, never a traceback.

0 done; 1 the work failed; 2 the call was wrong; 70 a fault of ldm-vae's own, the traceback is in the file that the
sentence names; 130 / 143 stopped by SIGINT / SIGTERM after saving; 141 nobody reads what it prints.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ldm_vae.core import terminal

WORKERS_HELP = (
    "with 0 workers (dataloader_num_workers, --num_workers) the main process reads the data itself; those that run out "
    "of memory need more of it, or of /dev/shm (a container's --shm-size)"
)
_PACKAGE = Path(__file__).parents[1]


class UsageError(ValueError):
    """The call was wrong: the sentence names the argument or field, what was expected, what came and what exists."""


class WorkError(RuntimeError):
    """The call was right and the work failed: the sentence says what happened and what is left."""


SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """SIGTERM or SIGINT arrived, the state was saved; the exit status says which (143 or 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a program's `main` and exit with the status that its outcome stands for."""
    terminal.prepare()
    # of diffusers' classes of sounds, at each layer: nothing that a user could change
    warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
    _heed_sigterm()
    try:
        _check_arguments(sys.argv[1:])
        main()
        sys.stdout.flush()
    except UsageError as error:
        _leave(2, error)
    except WorkError as error:
        _leave(1, error)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        print(f"stopped by {SIGNALS[number]}{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        sys.exit(128 + number)
    except SystemExit as stop:
        if (module := _leaving_module(stop)) is None:
            raise
        _leave(1, WorkError(f"{module} left the program with sys.exit({stop.code!r}) before it was done"))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)
        if (what := environment_failure(error)) is None:
            _leave(70, _fault(error))
        _leave(1, what)
    sys.exit(0)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: what Ctrl-C lets go of and cleans up, it does too."""


def _heed_sigterm() -> None:
    # of several processes of a launch one may wait for the others in C, where no handler of Python's runs
    if threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, _raise_terminated)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def resumable(left: str) -> Iterator[None]:
    """Around work that can be stopped: `left` is said with it, what is kept and what goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(left) from stop


def _check_arguments(words: Sequence[str]) -> None:
    """Raises UsageError for a word that is not UTF-8: safetensors, Arrow, JSON and YAML have no way to write it."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(
                f"argument {word}: expected UTF-8, got other bytes; rename it (convmv renames whole folders)"
            )


def _leaving_module(stop: SystemExit) -> str | None:
    """The module that raised it, unless it is this toolkit or a parser of command lines: a module of the user's own,
    whose exit status 0 would say that the work is done."""
    *_, (frame, _) = traceback.walk_tb(stop.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    return None if module.partition(".")[0] in ("__main__", "ldm_vae", "train", "eval", "argparse", "tyro") else module


def _leave(status: int, error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk behind it was said; the interpreter would say it again, as status 120
        _drop_output()
    sys.exit(status)


def _fault(error: Exception) -> str:
    """The sentence of an error that nobody foresaw; its traceback goes to a file, for whoever will mend it."""
    frames = traceback.extract_tb(error.__traceback__)
    # below it lie the libraries that it called; a wheel stands in site-packages itself, so the name alone says nothing
    ours = (one for one in reversed(frames) if _PACKAGE in Path(one.filename).parents and one.filename != __file__)
    frame = next(ours, frames[-1])
    what = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} ({frame.filename}:{frame.lineno})"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="ldm-vae-", suffix=".traceback", delete=False
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    except OSError as problem:
        return f"{what}; a fault of ldm-vae's, and its traceback could not be kept: {problem}"
    return f"{what}; a fault of ldm-vae's: please report it with {file.name}"


def _nobody_reads() -> bool:
    """True when stdout has lost its reader, as behind `| head`, which is no error."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if gone := any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        _drop_output()
    return gone


def _drop_output() -> None:
    """Lead stdout to /dev/null, or the interpreter complains on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    if "t allocate memory" in said:  # torch's on a CPU
        return WorkError(f"out of memory: {said}")
    if "DataLoader worker" in said:
        return WorkError(f"a data worker died: {said}; {WORKERS_HELP}")
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError") or "/gloo/" in said:
        silent = "imed out" in said or "imeout" in said
        what = "does not answer (ddp_timeout)" if silent else "died"
        return WorkError(f"another process of this launch {what}; what was saved is kept, the same command goes on")
    return None
