"""CMMD (Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation"): squared MMD
between CLIP embeddings of unit norm, kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10, times 1000.

The estimate is that of the published code (google-research/cmmd), which calls it the minimum-variance or biased one:
means of all n x n kernel values, i = j among them (Gretton et al. 2012, eq. 5); the paper's abstract calls it unbiased.
So it is 0 between equal sets, never negative, and biased upwards by a term in 1/N. At most KEPT images are compared
(`kept.py`); kernel values are summed block by block, so that memory is the features and one block.

Legend: D features, n m images.
"""

from __future__ import annotations

import torch

from ldm_vae.metrics.frechet import FEW_IMAGES, PairFeatures
from ldm_vae.metrics.kept import Kept
from ldm_vae.metrics.metric import Better
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.running import Summary

SIGMA, SCALE = 10.0, 1000.0
KEPT = 30_000  # as many as the paper compares (COCO 30K); 184 MB at D = 768
BLOCK = 2048  # rows of a block of kernel values: 34 MB in fp64


def cmmd(x: torch.Tensor, y: torch.Tensor, block: int = BLOCK) -> float:
    """The distance between embeddings x [n, D] and y [m, D]; they are brought to unit norm here."""
    x, y = (torch.nn.functional.normalize(features.double(), dim=1) for features in (x, y))
    # kernel values less 1: they all lie within 2 % of it, so that the ones, which cancel, would cost digits
    within = _sum(x, x, block) / len(x) ** 2 + _sum(y, y, block) / len(y) ** 2
    return SCALE * max(0.0, within - 2 * _sum(x, y, block) / (len(x) * len(y)))


def _sum(x: torch.Tensor, y: torch.Tensor, block: int) -> float:
    """Sum of k(x_i, y_j) - 1 over all i and j; half of the blocks where x is y."""
    total = 0.0
    for row, some in enumerate(torch.split(x, block)):
        for column, others in enumerate(torch.split(y, block)):
            if y is x and column < row:
                continue
            squared = (2 - 2 * some @ others.T).clamp(min=0)  # of unit vectors
            part = float(torch.expm1(squared / (-2 * SIGMA**2)).sum())
            total += 2 * part if y is x and column > row else part
    return total


class ClipDistance:
    """A metric of the whole sets."""

    better: Better = "lower"

    def __init__(self, name: str, features: PairFeatures, dimensions: int, kept: int = KEPT) -> None:
        self.name, self.kept = name, Kept("cmmd", features, dimensions, kept)

    def update(self, pair: Pair) -> None:
        self.kept.update(pair)

    def compute(self) -> Summary:
        originals, reconstructions, seen = self.kept.over_ranks()
        count = len(originals)
        if count < 2:
            return Summary(None, None, count, note="needs two images")
        notes = [f"{count:,} of {seen:,} images"] if count < seen else []
        notes += [f"biased: compare at N = {count:,} only"] if count < FEW_IMAGES else []
        return Summary(cmmd(originals, reconstructions), None, count, note="; ".join(notes) or None)
