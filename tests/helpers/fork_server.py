"""Run a program's `main` in a child forked from a server that has imported already: the program as a user runs it
(arguments, output, signals, exit status) without the ten seconds in which a new interpreter imports torch and
diffusers. The server never computes: a child of a process whose autograd or OpenMP threads run dies in its first
backward ("Invalid thread pool")."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from repository import ROOT

from ldm_vae.core.errors import run_program

# our programs, and what they import where they use it: a third of a second of each of a thousand children
PRELOAD = [
    "torch", "fork_server", "ldm_vae.cli", "ldm_vae.export.workflow", "ldm_vae.latent_store.write.writer",
    "ldm_vae.latent_store.write.updates", "ldm_vae.data.sources.folder", "train.autoencoder", "train.diffusion",
    "train.prior", "pandas", "pyarrow.dataset", "sklearn.mixture", "warm_caches",
]  # fmt: skip

AT_FIRST = dict(os.environ)  # this is imported before any test changes it


@dataclass(frozen=True)
class Finished:
    """Result of a program, in the form of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Child:
    """A running program."""

    process: Any
    folder: Path

    def running(self) -> bool:
        return bool(self.process.is_alive())

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> Finished:
        self.process.join(timeout)
        if self.running():
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s")
        files = [self.folder / name for name in ("out", "err")]  # a child killed at once has not made them
        out, err = (file.read_text() if file.exists() else "" for file in files)
        shutil.rmtree(self.folder)
        return Finished(self.process.exitcode, out, err)


def forkserver() -> ForkServerContext:
    """The context of the server, which the first call starts (some ten seconds), whatever the test that makes this call
    has done to its environment: the libraries read some variables once, when they are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    changed = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(AT_FIRST)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "tests" / "helpers"), str(ROOT), AT_FIRST.get("PYTHONPATH", "")]
        )
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(changed)
    return context


# in the place of a module's `multiprocessing`: its processes are then of the server, whatever method it asks for
SERVER = SimpleNamespace(get_context=lambda method: forkserver())


def fork(
    main: Callable[[], Any], arguments: Sequence[str], environment: Mapping[str, str] | None = None, where: Path = ROOT
) -> Child:
    """Start `main`, a function of a module, with `sys.argv[1:]` = arguments, in the folder `where`, in this process's
    environment and with what `environment` adds to it."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    added = {**os.environ, **(environment or {})}
    process = forkserver().Process(target=_child, args=(main, list(arguments), added, folder, where))
    process.start()
    atexit.register(process.kill)  # when its test fails, multiprocessing would wait for the end of a long training
    return Child(process, folder)


def _child(
    main: Callable[[], Any], arguments: list[str], environment: dict[str, str], folder: Path, where: Path
) -> None:
    status = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
        multiprocessing.set_start_method(None, force=True)  # that of a program, and not the server's, for data workers
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(where)
        sys.argv = [getattr(main, "__module__", "program"), *arguments]
        warnings.simplefilter("ignore")
        run_program(main)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
