"""Peaks of a device, as reached in this run: the roof that a step is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Peaks:
    """Peaks reached in this run: FLOP/s of a matrix product by type, bytes/s of a copy (read and written)."""

    flops: dict[torch.dtype, float]
    bytes: float

    def rows(self) -> list[dict[str, Any]]:
        """The peaks themselves."""
        found = [{"name": f"peak_{str(t).removeprefix('torch.')}", "value": v / 1e12, "unit": "TFLOP/s"}
                 for t, v in self.flops.items()]  # fmt: skip
        return [*found, {"name": "peak_copy", "value": self.bytes / 1e9, "unit": "GB/s"}]

    def seconds(self, flop: float, moved: float, dtype: torch.dtype) -> float:
        """The least that an operation takes."""
        return max(flop / self.flops.get(dtype, self.flops[torch.float32]), moved / self.bytes)


def peaks(device: str) -> Peaks:
    """Measure them; a second."""
    side, size = (8192, 2**31) if device == "cuda" else (1024, 2**27)
    flops = {}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions are by default
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        flops[dtype] = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, 5, device)
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(flops, 2 * size / seconds_of(lambda: target.copy_(source), 5, device))


def seconds_of(function: Callable[[], object], rounds: int, device: str) -> float:
    """Median time by the clock of a call that has run before, the device waited for."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        function()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
