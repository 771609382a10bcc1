"""Fréchet distance between two sets of features, taken as Gaussians (Heusel et al. 2017, eq. 6), in streaming sums.

Memory is two D x D matrices however many images there are. The estimate is biased upwards by a term in 1/N: numbers
compare at equal N only, and published ones are of 50,000 images.

Legend: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm_vae.metrics.metric import Better
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import total
from ldm_vae.metrics.running import Summary

FEW_IMAGES = 10_000  # below this the row says what the bias does

# (original, reconstruction), each [B, D], of the images of a pair that count
PairFeatures = Callable[[Pair], tuple[torch.Tensor, torch.Tensor]]


class Gaussian:
    """Mean and covariance of features that are seen once, in fp64. The products are of deviations from the mean so far
    (Chan, Golub & LeVeque 1979), since E[x x^T] - E[x] E[x]^T has no digits left where the mean is large."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None
        self.scatter: torch.Tensor | None = None  # the sum of (x - mean)(x - mean)^T

    def update(self, features: torch.Tensor) -> None:
        """features [B, D]."""
        if not len(features):
            return
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        if self.mean is None or self.scatter is None:
            self.mean, self.scatter = torch.zeros_like(mean), torch.zeros_like(mean).diag()
        step, count = mean - self.mean, self.count + len(features)
        # Chan's update: scatter about the batch's own mean, and what the two means are apart
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(features) / count)
        self.mean += step * (len(features) / count)
        self.count = count

    def compute(self, dimensions: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(N, mean [D], unbiased covariance [D, D]) over all ranks; N is at least 2."""
        # a rank without images takes part with zeros
        own = torch.zeros(dimensions, dtype=torch.float64) if self.mean is None else self.mean
        scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64) if self.scatter is None else self.scatter
        count = int(total(torch.tensor(self.count)))
        mean = total(own * self.count) / max(1, count)
        step = own - mean
        # the same formula over ranks: each about its own mean, moved to the common one
        covariance = total(scatter + self.count * torch.outer(step, step)) / max(1, count - 1)
        return count, mean, covariance


def frechet_distance(
    mean_x: torch.Tensor, covariance_x: torch.Tensor, mean_y: torch.Tensor, covariance_y: torch.Tensor
) -> float:
    """|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)); means [D], covariances [D, D], fp64.

    tr (Cx Cy)^(1/2) is the sum of the roots of the eigenvalues of the symmetric Cx^(1/2) Cy Cx^(1/2), which stays exact
    where there are fewer images than features and sqrtm of the product does not.
    """
    values, vectors = torch.linalg.eigh(covariance_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # rounding makes eigenvalues of 0 slightly negative
    cross = torch.linalg.eigvalsh(root @ covariance_y @ root).clamp(min=0).sqrt().sum()
    distance = (mean_x - mean_y).square().sum() + covariance_x.trace() + covariance_y.trace() - 2 * cross
    return max(0.0, float(distance))


class FrechetDistance:
    """A metric of the whole sets: of all originals and all reconstructions."""

    better: Better = "lower"

    def __init__(self, name: str, features: PairFeatures, dimensions: int) -> None:
        self.name, self.features, self.dimensions = name, features, dimensions
        self.originals, self.reconstructions = Gaussian(), Gaussian()

    def update(self, pair: Pair) -> None:
        original, reconstruction = self.features(pair.on_white)
        self.originals.update(original)
        self.reconstructions.update(reconstruction)

    def compute(self) -> Summary:
        count, mean, covariance = self.originals.compute(self.dimensions)
        _, other_mean, other_covariance = self.reconstructions.compute(self.dimensions)
        if count < 2:
            return Summary(None, None, count, note="needs two images")
        distance = frechet_distance(mean, covariance, other_mean, other_covariance)
        note = f"biased: compare at N = {count:,} only" if count < FEW_IMAGES else None
        return Summary(distance, None, count, note=note)
