"""Gaussian negative log-likelihood with a learned variance (Dai & Wipf 2019; Rybkin et al., ICML 2021, sigma-VAE).

Its log-variance is a parameter of the objective, hence in the optimiser and in the checkpoint. With `levels` the
likelihood is that of the stored value itself: the Gaussian's mass in the value's bin, which no variance makes infinite,
and with the KL at weight 1 the evidence lower bound is then one of discrete data.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.losses import TermConfig


class GaussianNLL(nn.Module):
    """Nats per pixel value: -log N(target; pixels, exp(logvar)), a mean over batch, channels and pixels."""

    domain = "pixels"
    likelihood = True  # with it the objective can tell the evidence lower bound

    def __init__(self, logvar: float, learned: bool, levels: int | None) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor(float(logvar)), requires_grad=learned)
        self.levels = levels

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logvar = self.logvar.to(pixels.dtype)
        if self.levels is not None:
            return -self._log_mass(pixels, target, torch.exp(0.5 * logvar), self.levels).mean()
        return 0.5 * ((pixels - target).square().mean() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))

    def nats_per_value(self, value: torch.Tensor) -> torch.Tensor:
        """`forward`'s value as a likelihood of stored values: a density is multiplied by the width of a bin of 8 bits,
        2 / 255 (right while the Gaussian is wider than a bin)."""
        return value if self.levels is not None else value - math.log(2 / 255)

    def figures(self) -> dict[str, torch.Tensor]:
        return {"sigma": torch.exp(0.5 * self.logvar.detach())}

    @staticmethod
    def _log_mass(pixels: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, levels: int) -> torch.Tensor:
        half = 1.0 / (levels - 1)  # half the distance of two of `levels` values in [-1, 1]
        low, high = ((target - half - pixels) / sigma, (target + half - pixels) / sigma)
        # the outermost values own the tails, so that the masses sum to 1
        low = torch.where(target <= -1 + half, -torch.inf, low)
        high = torch.where(target >= 1 - half, torch.inf, high)
        # on the side of the mean where both are negative, so that a difference of two ones never cancels
        flip = low > 0
        low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        # beyond some 13 deviations fp32 has no mass left; the density there still has a gradient
        nearest = torch.minimum(low.abs(), high.abs())
        tail = -0.5 * nearest.square() - torch.log(nearest.clamp_min(1.0)) - 0.5 * math.log(2 * math.pi)
        return torch.where(mass > 1e-30, mass.clamp_min(1e-30).log(), tail)


class Config(TermConfig):
    """Gaussian likelihood."""

    kind: Literal["gaussian_nll"] = "gaussian_nll"
    logvar: float = 0.0
    """Log-variance that it starts from."""
    learned: bool = True
    """Whether the variance is learned: the weights of reconstruction and rate then balance by themselves."""
    levels: int | None = Field(None, ge=2)
    """How many values a pixel can have (256 for 8 bits): the likelihood of the value instead of a density."""

    def build(self) -> GaussianNLL:
        return GaussianNLL(self.logvar, self.learned, self.levels)
