"""Kernel distance between two sets of features (Binkowski et al. 2018): unbiased MMD^2, kernel (x.y / D + 1)^3.

The mean over random subsets, as it is published. Subsets are drawn from at most KEPT images (`kept.py`).

Legend: D features, n images of a subset.
"""

from __future__ import annotations

import numpy as np
import torch

from ldm_vae.core import rng
from ldm_vae.metrics.frechet import PairFeatures
from ldm_vae.metrics.kept import Kept
from ldm_vae.metrics.metric import Better
from ldm_vae.metrics.protocol import Pair
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
        self.name, self.kept = name, Kept("kid", features, dimensions, kept)

    def update(self, pair: Pair) -> None:
        self.kept.update(pair)

    def compute(self) -> Summary:
        originals, reconstructions, _ = self.kept.over_ranks()
        count = len(originals)
        size = min(SUBSET_SIZE, count)
        if size < 2:
            return Summary(None, None, count, note="needs two images")
        draw = rng.generator(0, "kid subsets")
        distances = []
        for _ in range(SUBSETS):
            chosen, others = (draw.choice(count, size, replace=False) for _ in range(2))
            distances.append(squared_mmd(originals[chosen], reconstructions[others]))
        note = f"over {SUBSETS} subsets of {size:,}"
        return Summary(float(np.mean(distances)), None, count, float(np.std(distances)), note)
