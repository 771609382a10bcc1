"""Accelerate's launcher as a user calls it, and the ports that launches meet on."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile

from repository import ROOT

ACCELERATE = [  # Accelerate's launcher, without what it asks a user for
    "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def free_port() -> int:
    """A port that stays free for whoever is told its number: this process keeps it bound and does not listen, so that
    the kernel hands it to nobody else, and who listens with SO_REUSEADDR, as torch's store does, may have it."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    atexit.register(kept.close)
    return int(kept.getsockname()[1])


def launch(
    program: list[str], *options: str, file: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTIONS PROGRAM`, as a user without a GPU would, or with the options of a launch file."""
    by = ACCELERATE if file is None else ["-m", "accelerate.commands.launch", "--config_file", file]
    command = [sys.executable, *by, "--main_process_port", str(free_port()), *options, *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False
    )


def launch_machines(program: list[str], timeout: float = 300) -> list[tuple[int, str]]:
    """The same program on two "machines" of one process, each with its own launcher, rank and the same rendezvous."""
    common = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
        "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()),
        "--rdzv_backend", "static", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # files: a pipe that nobody reads yet would hold its writer up
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        machines = {
            subprocess.Popen(
                [*common, "--machine_rank", str(rank), *program],
                cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT,
            ): said
            for rank, said in enumerate((first, second))
        }  # fmt: skip
        try:
            for machine in machines:
                machine.wait(timeout)
        finally:
            for machine in machines:
                machine.kill()
                machine.wait()
        for said in machines.values():
            said.seek(0)
        return [(machine.returncode, said.read()) for machine, said in machines.items()]
