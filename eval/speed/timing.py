"""Fair timing on a machine that is never quiet: contenders take turns, and a ratio is taken within each round."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from ldm_vae.core.progress import Progress


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    name: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round. A B C, A B C, ...: what slows the machine down slows all of them down.
    One round before them warms caches up and is not counted.

    Args:
        clock: time.process_time for work that stays in this process and is asked for per core: other programs on the
            machine then count only as far as they take the cache.
    """
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for number in Progress(range(rounds + 1), desc=name, unit="round", leave=False):
        for contender, run in contenders.items():
            start = clock()
            run()
            if number:
                times[contender].append(clock() - start)
    return times


def row(name: str, times: Mapping[str, list[float]], contender: str, to: str | None, **more: Any) -> dict[str, Any]:
    """One result of speed.json. The ratio is the time of `to` over the time of the contender, round by round: above 1
    means that the contender is faster."""
    found: dict[str, Any] = {"name": name, "median_s": statistics.median(times[contender])}
    if to is not None:
        ratios = [theirs / own for theirs, own in zip(times[to], times[contender], strict=True)]
        found["ratio"] = {"to": to, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return found | more


class PeakMemory:
    """The growth of this process's resident memory while the block runs, at its largest.

    Looked at every five milliseconds, since only Linux keeps a peak that can be had back.
    """

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """So far."""
        self._look()
        return self._peak - self._before


def machine() -> dict[str, Any]:
    """Machine that the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
