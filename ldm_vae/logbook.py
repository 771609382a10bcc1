"""The run's diary: averages over an interval, `metrics.jsonl`, trackers, and the check that numbers are numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.errors import WorkError


class Averages:
    """Sums of named scalars on the device: nothing waits for the device until `means`."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def update(self, logs: Mapping[str, torch.Tensor]) -> None:
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def synchronise(self, accelerator: Accelerator) -> None:
        """Make the sums of an unfinished interval the same on all ranks, so that rank 0's can be saved for all."""
        self.sums = {name: accelerator.reduce(value, "mean") for name, value in sorted(self.sums.items())}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = state["sums"], state["counts"]

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each over the interval so far and over all ranks, in one collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name].double() / self.counts[name] for name in names])
        return dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))

    def reset(self) -> None:
        """Start a new interval."""
        self.sums, self.counts = {}, {}


def check_finite(means: Mapping[str, float], since: int, until: int, kept: str) -> None:
    """Raises WorkError when a logged value is NaN or infinite: names it, the interval, and what was kept."""
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise WorkError(
            f"{', '.join(bad)} became NaN or infinite between {since:,} and {until:,} images; stopped, {kept}"
        )


class Logbook:
    """One JSON object a line in `metrics.jsonl`, and the same to the trackers that `report_to` names."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator

    def cut_back(self, images_seen: int) -> None:
        """Drop the lines behind a checkpoint (resume) or all (a fresh start), so that each interval stands once."""
        if not (self.accelerator.is_main_process and self.path.exists()):
            return
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if _is_until(line, images_seen)]
        beside = self.path.with_suffix(".jsonl.tmp")
        beside.write_text("".join(lines))
        beside.replace(self.path)

    def write(self, images_seen: int, values: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        first = {} if self.path.exists() and self.path.stat().st_size else self._first()
        with self.path.open("a") as file:
            file.write(json.dumps({"images": images_seen, **first, **values}) + "\n")
        self.accelerator.log(dict(values), step=images_seen)

    def _first(self) -> dict[str, Any]:
        return {"num_processes": self.accelerator.num_processes}


def _is_until(line: str, images_seen: int) -> bool:
    try:
        return int(json.loads(line)["images"]) <= images_seen
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return False
