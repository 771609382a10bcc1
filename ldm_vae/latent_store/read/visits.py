"""Visits: which draw of a sample comes next, counted in memory that a process shares with its data workers.

A torch DataLoader hands its dataset nothing but indices: not the epoch, and workers have a copy of the dataset. Counted
per sample in shared memory, the next draw is a new one for any sampler and any kind of worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import context, reduction
from typing import Any

import numpy as np
import torch

from ldm_vae.core import distributed

HEADER = 8  # bytes in front of the counts: the epoch, int64
RANK_BITS = 32

_threads = threading.Lock()
# held over a fork, so that no child begins with it taken
os.register_at_fork(before=_threads.acquire, after_in_parent=_threads.release, after_in_child=_threads.release)


class Visits:
    """The epoch, and how often each sample was drawn in it.

    Forked and spawned workers count in the same memory (4 bytes per sample, taken when they are first written); any
    other copy (pickle, deepcopy) goes on for itself from where this one is.
    """

    def __init__(self, samples: int) -> None:
        self._rank: int | None = None
        self._map(_anonymous(HEADER + 4 * samples), samples)

    def _map(self, descriptor: int, samples: int) -> None:
        self.samples, self._descriptor = samples, descriptor
        weakref.finalize(self, os.close, descriptor)
        memory = memoryview(mmap.mmap(descriptor, HEADER + 4 * samples))
        self._epoch, self._counts = memory[:HEADER].cast("q"), memory[HEADER:].cast("i")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process counts. The kernel gives up the lock of a process that dies."""
        with _threads:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    @property
    def epoch(self) -> int:
        """The epoch that is counted."""
        return self._epoch[0]

    @property
    def rank(self) -> int:
        """Rank of the process, or of the process whose worker this is."""
        return distributed.rank() if self._rank is None else self._rank

    def begin(self, epoch: int) -> None:
        """Begin an epoch: its counts are 0. The epoch that is under way goes on."""
        with self._alone():
            if epoch != self._epoch[0]:
                self._epoch[0] = epoch
                np.asarray(self._counts)[:] = 0

    def next(self, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Count one draw of each of these samples (of one that is there twice, two); returns the epoch and, per
        sample, a number that no other draw of the sample in this epoch has, on any rank: 0 is the first one of rank
        0."""
        rank = self.rank
        found = []
        with self._alone():
            for index in indices:
                found.append(self._counts[index] << RANK_BITS | rank)
                self._counts[index] += 1
            return self._epoch[0], found

    def state_dict(self) -> dict[str, Any]:
        """Epoch, counts (int32 [N]) and rank."""
        with self._alone():
            counts = torch.from_numpy(np.array(self._counts, dtype=np.int32))
            return {"epoch": self._epoch[0], "visits": counts, "rank": self.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        with self._alone():
            self._epoch[0] = state["epoch"]
            torch.from_numpy(np.asarray(self._counts)).copy_(state["visits"])

    def __getstate__(self) -> dict[str, Any]:
        if context.get_spawning_popen() is None:
            return self.state_dict()
        # a worker's process knows neither the process group nor its rank
        return {"descriptor": reduction.DupFd(self._descriptor), "samples": self.samples, "rank": self.rank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "descriptor" in state:
            self._rank = state["rank"]
            self._map(state["descriptor"].detach(), state["samples"])
        else:
            self.__init__(len(state["visits"]))  # type: ignore[misc]
            self.load_state_dict(state)


def _anonymous(size: int) -> int:
    """Descriptor of zeroed memory that has no name, so that nothing of it can be left behind."""
    if sys.platform == "linux":
        # not /dev/shm, which a container limits to 64 MB by default
        descriptor = os.memfd_create("ldm-vae-visits")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
