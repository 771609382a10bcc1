"""SIGKILL at random moments: the one place where tests and the torture kill, count the dead and start them again.

A victim is a forked child (fork_server.py: the real entry point without the seconds of importing) or a launched
program: a new interpreter, alone or under Accelerate's launcher.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil
from fork_server import Child, Finished, fork
from launcher import ACCELERATE, free_port
from repository import ROOT


class Victim(Protocol):
    """A running program that can be killed."""

    def running(self) -> bool: ...

    def kill(self, number: int) -> None: ...

    def wait(self, timeout: float = 300) -> Finished: ...


def wait_until(true: Callable[[], object], victim: Victim) -> None:
    """Until something is true that the victim is about to bring about."""
    while not true():
        assert victim.running() or true(), victim.wait().stderr
        time.sleep(0.005)


def wait_for(path: Path, victim: Victim) -> None:
    """Until the victim has made this file or folder."""
    wait_until(path.exists, victim)


# --- victims that wait ------------------------------------------------------------------------------------------------


def fork_until(path: Path, main: Callable[[], object], arguments: Sequence[str]) -> Child:
    """`main` in a forked child that stands still as soon as it has made `path`, until it gets SIGCONT.

    A victim that goes on may have come to its end by the time that a busy machine lets us act."""
    victim = fork(partial(_until, path, main), arguments)
    wait_until(lambda: stands_still(victim), victim)
    assert path.exists()
    return victim


def stands_still(victim: Child) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        return bool(psutil.Process(victim.process.pid).status() == psutil.STATUS_STOPPED)
    return False


def _until(path: Path, main: Callable[[], object]) -> None:
    """`main`, stopped by itself at the first file that it opens when `path` is there."""
    here, waits = os.getpid(), True

    def look(event: str, _what: object) -> None:
        nonlocal waits
        if waits and event == "open" and os.getpid() == here and path.exists():
            waits = False
            os.kill(here, signal.SIGSTOP)

    sys.addaudithook(look)
    main()


# --- kills ------------------------------------------------------------------------------------------------------------


@dataclass
class Reaper:
    """Kills after a random time, and learns how long victims take: kills stay spread over the whole of their lives."""

    draw: random.Random
    longest: float = 0.5
    kills: int = 0
    started: int = 0

    def strike(
        self, victims: Sequence[Victim], *, one: bool = False, begun: Callable[[], bool] = lambda: True
    ) -> list[Finished]:
        """Let the victims work until `begun`, then for a random time; kill whoever still does, or only one of them (the
        others are then ended as a launcher ends them). How each of them ended."""
        self.started += len(victims)
        while not begun() and any(victim.running() for victim in victims):
            time.sleep(0.002)
        deadline = time.monotonic() + self.draw.uniform(0.0, self.longest)
        while time.monotonic() < deadline and any(victim.running() for victim in victims):
            time.sleep(0.002)
        alive = [victim for victim in victims if victim.running()]
        chosen = [self.draw.choice(alive)] if one and alive else alive
        for victim in chosen:
            victim.kill(signal.SIGKILL)
        self.kills += len(chosen)
        self.longest = min(60.0, max(0.02, self.longest * (1.15 if alive else 0.8)))
        for victim in victims:
            if victim not in chosen:
                end_as_a_launcher_does(victim)
        return [victim.wait() for victim in victims]


def end_as_a_launcher_does(victim: Victim, grace: float = 15.0) -> None:
    """A process whose fellow has died ends by itself within the grace, or is told to, or is made to."""
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        if number and victim.running():
            victim.kill(number)
        deadline = time.monotonic() + grace
        while victim.running() and time.monotonic() < deadline:
            time.sleep(0.005)


def ranks(main: Callable[[], object], arguments: Sequence[str], processes: int) -> list[Child]:
    """`main` in forked children that are one launch: with the environment that a launcher gives them."""
    if processes == 1:
        return [fork(main, arguments)]
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        fork(main, arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank), **together}) for rank in range(processes)
    ]


# --- new interpreters -------------------------------------------------------------------------------------------------


@dataclass
class Launched:
    """A program in a session of its own: an interpreter, or a launcher with its processes."""

    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self, number: int) -> None:
        """The whole tree."""
        for member in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                member.send_signal(number)

    def kill_alone(self) -> list[psutil.Process]:
        """The launcher, and not its processes, which are returned."""
        family = self.members()
        self.process.kill()
        self.process.wait()
        return family[1:]

    def members(self) -> list[psutil.Process]:
        """The launcher and what it started."""
        if not self.running():
            return []
        here = psutil.Process(self.process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            return [here, *here.children(recursive=True)]
        return []

    def wait(self, timeout: float = 300) -> Finished:
        self.process.wait(timeout)
        out, err = ((Path(self.folder.name) / name).read_text() for name in ("out", "err"))
        self.folder.cleanup()
        return Finished(self.process.returncode, out, err)


def launch_program(words: Sequence[str], processes: int = 1, environment: dict[str, str] | None = None) -> Launched:
    """`python WORDS`, under `accelerate launch` when there are several processes."""
    port, number = str(free_port()), str(processes)
    launcher = [*ACCELERATE, "--multi_gpu", "--main_process_port", port, "--num_processes", number]
    command = [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), *words]
    fresh = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    fresh |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **(environment or {})}
    folder = tempfile.TemporaryDirectory(prefix="launched-")
    with (Path(folder.name) / "out").open("wb") as out, (Path(folder.name) / "err").open("wb") as err:
        process = subprocess.Popen(command, env=fresh, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
    return Launched(process, folder)
