"""Kernel distance between two sets of features (Binkowski et al. 2018): unbiased MMD^2, kernel (x.y / D + 1)^3.

The mean over random subsets, as it is published. Subsets are drawn from at most KEPT images, those whose keyed number
is smallest: the same images whatever the number of processes, and memory does not grow with N.

Legend: B batch, D features, n images of a subset.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ldm_vae import keyed
from ldm_vae.metrics.frechet import PairFeatures
from ldm_vae.metrics.metric import Better
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import gather
from ldm_vae.metrics.running import Summary

KEPT = 10_000
SUBSETS, SUBSET_SIZE = 100, 1000


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate between features x and y, each [n, D]."""
    n, dimensions = x.shape
    x, y = x.double(), y.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / dimensions + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * xy.mean())


class KernelDistance:
    """A metric of the whole sets; its deviation is over subsets, as published, not over images."""

    better: Better = "lower"

    def __init__(self, name: str, features: PairFeatures, dimensions: int, kept: int = KEPT) -> None:
        self.name, self.features, self.dimensions, self.kept = name, features, dimensions, kept
        self.rows = torch.empty(0, 1 + 2 * dimensions)  # number, original, reconstruction

    def update(self, pair: Pair) -> None:
        original, reconstruction = self.features(pair)
        numbers = [float(keyed.generator(0, "kid", index).random()) for index in pair.indices]
        rows = torch.cat([torch.tensor(numbers)[:, None], original.float().cpu(), reconstruction.float().cpu()], dim=1)
        self.rows = _smallest(torch.cat([self.rows, rows]), self.kept)

    def compute(self) -> Summary:
        longest = int(gather(torch.tensor(len(self.rows))).max())
        padding = torch.full((longest - len(self.rows), self.rows.shape[1]), math.inf)
        everybody = gather(torch.cat([self.rows, padding])).flatten(0, 1)
        rows = _smallest(everybody[everybody[:, 0].isfinite()], self.kept)
        count = len(rows)
        size = min(SUBSET_SIZE, count)
        if size < 2:
            return Summary(None, None, count, note="needs two images")
        originals, reconstructions = rows[:, 1 : 1 + self.dimensions], rows[:, 1 + self.dimensions :]
        draw = keyed.generator(0, "kid subsets")
        distances = []
        for _ in range(SUBSETS):
            chosen, others = (draw.choice(count, size, replace=False) for _ in range(2))
            distances.append(squared_mmd(originals[chosen], reconstructions[others]))
        note = f"over {SUBSETS} subsets of {size:,}"
        return Summary(float(np.mean(distances)), None, count, float(np.std(distances)), note)


def _smallest(rows: torch.Tensor, kept: int) -> torch.Tensor:
    return rows[rows[:, 0].argsort(stable=True)[:kept]]
