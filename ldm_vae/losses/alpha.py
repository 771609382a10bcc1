"""Mean absolute error of alpha, for images that have it; the terms on pixels then see colour over a background that is
drawn for each image (so does AlphaVAE, Wang et al. 2025)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.losses import TermConfig


class AlphaL1(nn.Module):
    """mean |alpha - target|, both [B, 1, H, W] in [-1, 1]."""

    domain = "alpha"

    def forward(self, alpha: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (alpha - target).abs().mean()


class Config(TermConfig):
    """Mean absolute error of alpha."""

    kind: Literal["alpha"] = "alpha"

    def build(self) -> AlphaL1:
        return AlphaL1()
