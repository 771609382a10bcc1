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

FAR = -1e6  # deviations below which log Phi is its leading term, to 12 digits


class GaussianNLL(nn.Module):
    """Nats per pixel value: -log N(target; pixels, exp(logvar)), a mean over batch, channels and pixels."""

    domain = "pixels"
    likelihood = True  # with it the objective can tell the evidence lower bound

    def __init__(self, logvar: float, learned: bool, levels: int | None) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor(float(logvar)), requires_grad=learned)
        self.levels = levels

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.levels is not None:
            return -self._log_mass(pixels, target, self.logvar, self.levels).mean().to(pixels.dtype)
        logvar = self.logvar.to(pixels.dtype)
        return 0.5 * ((pixels - target).square().mean() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))

    def nats_per_value(self, value: torch.Tensor) -> torch.Tensor:
        """`forward`'s value as a likelihood of stored values: a density is multiplied by the width of a bin of 8 bits,
        2 / 255: close while sigma is wider than a bin; below, it exceeds any probability and is no bound of stored
        values."""
        return value if self.levels is not None else value - math.log(2 / 255)

    def masses(self, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities fp64 [..., L] of the L levels of values whose means are pixels [...]; they sum to 1."""
        assert self.levels is not None
        values = torch.linspace(-1, 1, self.levels, dtype=torch.float64, device=pixels.device)
        return self._log_mass(pixels[..., None], values, self.logvar, self.levels).exp()

    def figures(self) -> dict[str, torch.Tensor]:
        return {"sigma": torch.exp(0.5 * self.logvar.detach())}

    @staticmethod
    def _log_mass(pixels: torch.Tensor, target: torch.Tensor, logvar: torch.Tensor, levels: int) -> torch.Tensor:
        """log P(low < N(0, 1) < high) of each value's bin, low and high in deviations, as a difference in log space:

            log(Phi(high) - Phi(low)) = log Phi(high) + log(1 - exp(log Phi(low) - log Phi(high)))

        In fp64: in fp32 the difference of the two logarithms has no digit left at 30 deviations or in a narrow bin.
        """
        sigma = torch.exp(0.5 * logvar.double())
        half = 1.0 / (levels - 1)  # half the distance of two of `levels` values in [-1, 1]
        away, width = (target.double() - pixels.double()) / sigma, half / sigma
        # on the side of the mean where Phi is small: log Phi keeps its digits there, and so does their difference
        centre = -away.abs()
        high, low = _log_ndtr(centre + width), _log_ndtr(centre - width)
        # log Phi is concave and its slope is above -x, hence the bound; the difference of two huge ones rounds above it
        inside = high + torch.log(-torch.expm1(torch.minimum(low - high, 2 * centre * width)))
        # the outermost values own the tails, so that the masses sum to 1
        first, last = _log_ndtr(width + away), _log_ndtr(width - away)
        return torch.where(target <= -1 + half, first, torch.where(target >= 1 - half, last, inside))


def _log_ndtr(x: torch.Tensor) -> torch.Tensor:
    """log Phi(x), whose gradient torch has wrong from -1e8 on (infinite at -1e12): there log Phi is -x^2 / 2."""
    near = x.clamp(min=FAR)
    found: torch.Tensor = torch.special.log_ndtr(near) + 0.5 * (near - x) * (near + x)
    return found


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
