"""Channel dropout: whole channels of the latent are left out, so that no single one carries what matters
(Tompson et al., CVPR 2015, on the latent)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.perturbations import Draw, PerturbationConfig


class ChannelDropout(nn.Module):
    """Each channel of each image is 0 with probability p; the others are divided by 1 - p, as nn.Dropout2d does."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def noise_channels(self, latent_channels: int) -> int:
        return latent_channels

    def forward(self, latents: torch.Tensor, target: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        chance = torch.stack([draw.uniform(channel) for channel in range(latents.shape[1])], dim=1)  # [B, c]
        kept = (chance >= self.probability).to(latents.dtype) / (1 - self.probability)
        return latents * kept.view(*kept.shape, *(1,) * (latents.ndim - 2)), target


class Config(PerturbationConfig):
    """Latent channels left out."""

    kind: Literal["channel_dropout"] = "channel_dropout"
    probability: float = Field(0.1, ge=0, lt=1)
    """Of each channel of each image."""

    def build(self, seed: int) -> ChannelDropout:
        return ChannelDropout(self.probability)
