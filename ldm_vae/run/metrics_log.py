"""Metrics log of a run: averages over an interval, `metrics.jsonl`, trackers, and the check for NaN."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import WorkError
from ldm_vae.run.log_file import read_lines


class Averages:
    """Sums of named scalars on the device, without a synchronisation until `means`. A vector (the KL of each channel)
    counts as one scalar for each entry, by number: name/0, name/1, ...

    With `skip_nan` a value that is NaN or infinite does not count; otherwise it shows in the mean.
    """

    def __init__(self, skip_nan: bool = False) -> None:
        self.skip_nan = skip_nan
        self.sums: dict[str, torch.Tensor] = {}  # [2, ...]: sum and count

    def update(self, logs: Mapping[str, torch.Tensor]) -> None:
        for name, value in logs.items():
            counts = torch.isfinite(value) if self.skip_nan else torch.ones_like(value, dtype=torch.bool)
            entry = torch.stack([torch.where(counts, value, 0.0).double(), counts.double()])
            # a resumed sum comes from a file, hence from the CPU
            self.sums[name] = self.sums[name].to(entry.device) + entry if name in self.sums else entry

    def synchronise(self, accelerator: Accelerator) -> None:
        """Make the sums of an unfinished interval the same on all ranks, so that rank 0's can be saved for all."""
        self.sums = {name: accelerator.reduce(value, "mean") for name, value in sorted(self.sums.items())}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.sums

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError for what is no sum and count."""
        if any(value.ndim < 1 or len(value) != 2 for value in state.values()):
            raise ValueError("averages: expected a sum and a count of each")
        self.sums = dict(state)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each over the interval so far and over all ranks, in one collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = accelerator.reduce(torch.cat([self.sums[name].reshape(2, -1) for name in names], dim=1), "mean")
        labels = [
            f"{name}/{entry}" if self.sums[name].ndim > 1 else name
            for name in names
            for entry in range(self.sums[name][0].numel())
        ]
        found = zip(labels, *sums.tolist(), strict=True)
        return {label: total / count for label, total, count in found if count > 0}

    def reset(self) -> None:
        """Start a new interval."""
        self.sums = {}


def check_finite(means: Mapping[str, float], since: int, until: int, kept: str) -> None:
    """Raises WorkError when a logged value is NaN or infinite: names it, the interval, and what was kept."""
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise WorkError(
            f"{', '.join(bad)} became NaN or infinite between {since:,} and {until:,} images; stopped, {kept}"
        )


class Logbook:
    """Log of a run: one JSON object per line in `metrics.jsonl`, and the same to the trackers that `report_to`
    names."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self.lines: list[dict[str, Any]] = []
        self._since = time.monotonic()
        self._before = 0.0

    def cut_back(self, images_seen: int) -> None:
        """Drop the lines behind a checkpoint (resume) or all (a fresh start), so that each interval stands once."""
        if not (self.accelerator.is_main_process and self.path.exists()):
            return
        kept = [(text, line) for text, line in read_lines(self.path) if line["images"] <= images_seen]
        atomic_io.replace(self.path, atomic_io.data("".join(f"{text}\n" for text, _ in kept).encode()))
        self.lines = [line for _, line in kept]
        self._before = float(self.lines[-1].get("seconds", 0.0)) if self.lines else 0.0

    def write(self, images_seen: int, values: Mapping[str, float], warnings: Mapping[str, str] | None = None) -> None:
        """Write one line: the values, and a monitor's sentences for this interval by name. `seconds` is the run's time
        so far, without what a kill lost."""
        if not self.accelerator.is_main_process:
            return
        first = {} if self.lines else {"num_processes": self.accelerator.num_processes}
        seconds = round(self._before + time.monotonic() - self._since, 1)
        line = {"images": images_seen, "seconds": seconds, **first, **values}
        line |= {"warnings": dict(warnings)} if warnings else {}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self.accelerator.log(dict(values), step=images_seen)
