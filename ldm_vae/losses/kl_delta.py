"""delta-VAE (Razavi, van den Oord, Poole & Vinyals, ICLR 2019): a prior that no posterior of this family can equal, so
that the rate cannot fall below a known delta.

The prior correlates each latent with the one before it, in reading order, channel by channel: z_1 ~ N(0, 1), z_t ~
N(a z_(t-1), 1 - a^2). A posterior of independent latents is at least delta = ((n - 2) log(1 + a^2) - log(1 - a^2)) / 2
nats a channel away where n > 1, wherever it lies.

Legend: B batch, c latent channels, h w latent positions, n = h w of them in reading order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class KLDelta(nn.Module):
    """KL(q || AR(1) prior) in nats per pixel value."""

    domain = "latents"
    needs = "posterior"

    def __init__(self, correlation: float) -> None:
        super().__init__()
        self.correlation = correlation

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        nats = kl_to_autoregressive(reconstruction.moments, self.correlation).sum()
        return nats / reconstruction.images.numel()


def kl_to_autoregressive(moments: Moments, correlation: float) -> torch.Tensor:
    """KL in nats of each latent element given those before it [B, c, n]; its sum over n is the KL of a channel."""
    mean, logvar = moments.mean.flatten(2), moments.logvar.flatten(2)
    variance, rest = logvar.exp(), 1 - correlation**2
    first = mean[..., :1].square() + variance[..., :1]
    # E over q of the squared error of the prior's prediction
    error = (mean[..., 1:] - correlation * mean[..., :-1]).square() + variance[..., 1:]
    error = (error + correlation**2 * variance[..., :-1]) / rest + math.log(rest)
    return 0.5 * (torch.cat([first, error], dim=-1) - 1 - logvar)


class Config(TermConfig):
    """Rate against a prior that correlates latents, never below a floor."""

    kind: Literal["kl_delta"] = "kl_delta"
    weight: float = 1.0
    """beta."""
    correlation: float = Field(0.5, gt=-1, lt=1)
    """Of neighbouring latents in the prior; the floor is near log(1 + correlation^2) / 2 nats for each latent element
    of many positions, 0 at a single one. 0 is the plain KL."""

    def build(self) -> KLDelta:
        return KLDelta(self.correlation)
