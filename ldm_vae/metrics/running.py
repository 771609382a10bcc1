"""Streaming mean and variance of one number per image, merged over ranks, and the interval of the mean.

Memory does not grow with the number of images, and N is exact: every image counts once, whoever measured it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.core.intervals import t95
from ldm_vae.metrics.ranks import gather


@dataclass(frozen=True)
class Summary:
    """A metric over a data set. `mean` is None where it could not be measured, and `note` says why; `better` (higher,
    lower) of a metric of somebody's own, which has no row in `TITLES`."""

    mean: float | None
    ci95: tuple[float, float] | None
    n: int
    std: float | None = None
    note: str | None = None
    better: str | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return self.note or "not measured"
        interval = "" if self.ci95 is None else " (95 % interval {:.4g} to {:.4g})".format(*self.ci95)
        return f"{self.mean:.4g}{interval}"

    def to_json(self) -> dict[str, Any]:
        """{"mean", "ci95", "n"} and, where there are, "std", "note" and "better"."""
        base = {"mean": self.mean, "ci95": None if self.ci95 is None else list(self.ci95), "n": self.n}
        extra = {"std": self.std, "note": self.note, "better": self.better}
        return base | {key: value for key, value in extra.items() if value is not None}


class Running:
    """Count, mean and sum of squared deviations, in fp64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, values: torch.Tensor) -> None:
        """values [B], one per image."""
        if values.numel():
            values = values.detach().double()
            mean = values.mean()
            self._merge(values.numel(), float(mean), float((values - mean).square().sum()))

    def _merge(self, count: float, mean: float, squares: float) -> None:
        # Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * count / total
        self.squares += squares + delta * delta * self.count * count / total
        self.count = total

    def over_ranks(self) -> Running:
        """The same over all ranks, merged in rank order, so that every rank gets the same bits."""
        merged = Running()
        state = torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)
        for count, mean, squares in gather(state).tolist():
            if count:
                merged._merge(count, mean, squares)
        return merged

    def summary(self) -> Summary:
        """Mean, 95 % interval of the mean over images (Student's t; None for a single image), N and deviation."""
        n = int(self.count)
        if n == 0:
            return Summary(None, None, 0, note="no images")
        if n == 1:
            return Summary(self.mean, None, 1)
        std = math.sqrt(self.squares / (n - 1))
        half = t95(n - 1) * std / math.sqrt(n)
        return Summary(self.mean, (self.mean - half, self.mean + half), n, std)
