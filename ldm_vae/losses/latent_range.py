"""Keep the latents themselves within a range: what lies beyond is squared.

For latents that are stored in few bits, or handed to a diffusion model that expects no outliers.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class LatentRange(nn.Module):
    """mean relu(|mean of q(z|x)| - limit)^2 over the latent elements."""

    domain = "latents"

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        return F.relu(reconstruction.moments.mean.abs() - self.limit).square().mean()


class Config(TermConfig):
    """Latents beyond a limit."""

    kind: Literal["latent_range"] = "latent_range"
    limit: float = Field(8.0, gt=0)
    """Raw latents up to this size are free."""

    def build(self) -> LatentRange:
        return LatentRange(self.limit)
