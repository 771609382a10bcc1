"""Gaussian noise on the latents, so that the decoder forgives a diffusion model's small errors (RAE, Zheng et al. 2025;
l-DeTok, Yang et al. 2025)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.perturbations import Draw, PerturbationConfig


class LatentNoise(nn.Module):
    """latents + sigma * noise; sigma is drawn per image from [0, sigma] unless it is fixed."""

    def __init__(self, sigma: float, fixed: bool) -> None:
        super().__init__()
        self.sigma = sigma
        self.fixed = fixed

    def noise_channels(self, latent_channels: int) -> int:
        return latent_channels + (0 if self.fixed else 1)

    def forward(self, latents: torch.Tensor, target: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        channels = latents.shape[1]
        sigma = self.sigma if self.fixed else self.sigma * draw.uniform(channels).view(-1, *(1,) * (latents.ndim - 1))
        return latents + sigma * draw.noise[:, :channels], target


class Config(PerturbationConfig):
    """Noise on the latents."""

    kind: Literal["latent_noise"] = "latent_noise"
    sigma: float = Field(0.1, ge=0)
    """Standard deviation, in units of the raw latents."""
    fixed: bool = False
    """The same sigma for every image; else uniform between 0 and it."""

    def build(self, seed: int) -> LatentNoise:
        return LatentNoise(self.sigma, self.fixed)
