"""Run a program's `main` in a forked child: the program as a user runs it (arguments, output, signals, exit status)
without the ten seconds in which a new interpreter imports torch and diffusers."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT

from ldm_vae.errors import run_program


@dataclass(frozen=True)
class Finished:
    """As subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Child:
    """A running program."""

    pid: int
    out: IO[str]
    err: IO[str]
    status: int | None = None

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is None

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> Finished:
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s")
            time.sleep(0.005)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        assert self.status is not None
        return Finished(os.waitstatus_to_exitcode(self.status), *texts)


def fork(main: Callable[[], Any], arguments: Sequence[str]) -> Child:
    """Start `main` with `sys.argv[1:]` = arguments in a child."""
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - closed by `wait`
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads: torch's are idle in the parent
        pid = os.fork()
    if pid == 0:
        _child(main, arguments, out, err)
    return Child(pid, out, err)


def _child(main: Callable[[], Any], arguments: Sequence[str], out: IO[str], err: IO[str]) -> None:
    status = 70
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.chdir(ROOT)
        sys.argv = [getattr(main, "__module__", "program"), *arguments]
        warnings.simplefilter("ignore")
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        run_program(main)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
