"""`eval.speed grow`: what more work costs: one training step of ours as resolution, batch and processes grow.

- `grow_resolution`, `grow_batch`: a step, and the growth of the memory of a process that does nothing else;
- `grow_processes`: a step of one process and of two that average their gradients over gloo, each on a batch and a
  thread of its own: a ratio of 1 means that the second process costs no time.

Every point lives in a process of its own (or in two) and waits for its turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ldm_vae.core.errors import WorkError

from .recipes import Networks, Workload, ours
from .timing import PeakMemory, interleave, row

SMALL = Workload(widths=(32, 64, 64, 64), resolution=64, net="alex", critic_width=32)
RESOLUTIONS, BATCHES, PROCESSES = (64, 128, 256), (1, 2, 4, 8), (1, 2)
STEPS = 3  # of a turn


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    rows = _steps("resolution", {side: (replace(SMALL, resolution=side), 1) for side in RESOLUTIONS}, options.rounds)
    rows += _steps("batch", {images: (replace(SMALL, batch=images), 1) for images in BATCHES}, options.rounds)
    rows += _steps("processes", {count: (SMALL, count) for count in PROCESSES}, options.rounds)
    return rows


def _steps(what: str, points: Mapping[int, tuple[Workload, int]], rounds: int) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        groups = {at: stack.enter_context(Group(work, count)) for at, (work, count) in points.items()}
        times = interleave({str(at): group.step for at, group in groups.items()}, rounds, f"grow, {what}")
        each = {at: [value / STEPS for value in values] for at, values in times.items()}
        first = str(min(points))
        rows = []
        for at, (work, count) in points.items():
            found = row(f"grow_{what}", each, str(at), None if str(at) == first else first, against=what, at=at)
            rate = count * work.batch / found["median_s"]
            rows.append(found | {"images_per_s": rate, "memory_mb": round(groups[at].memory / 1e6)})
    return rows


class Group:
    """Processes that train together and wait in between; `step` has each do STEPS, `memory` is the largest growth of
    one of them in bytes."""

    def __init__(self, work: Workload, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.memory, self._ends, self._processes = 0, [], []
        self._kept = socket.socket()  # bound and not listening: the port is nobody else's until rank 0 listens there
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", 0))
        port = self._kept.getsockname()[1]
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work, rank, count, port), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def step(self) -> None:
        try:
            for end in self._ends:
                end.send(True)
            self.memory = max(end.recv() for end in self._ends)
        except (EOFError, ConnectionError) as error:
            raise WorkError("eval.speed grow: a training process died") from error

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._kept.close()


def _serve(end: Connection, work: Workload, rank: int, count: int, port: int) -> None:
    """A training process: steps whenever it is told to, until nobody is there to tell it."""
    # one core each, said so that Accelerate does not give every process all of them
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        step, images = ours(Networks(work)), work.images()
        try:
            while end.recv():
                for _ in range(STEPS):
                    step(images)
                end.send(memory.bytes)
        except EOFError:
            return
