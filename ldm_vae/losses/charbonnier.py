"""Charbonnier loss: l1 with a rounded tip, so that small errors are not over-corrected (Charbonnier et al. 1994;
Lai et al., CVPR 2017, eq. 2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.losses import TermConfig


class Charbonnier(nn.Module):
    """mean sqrt((pixels - target)^2 + epsilon^2) - epsilon: 0 for equal images, l1 far from them."""

    domain = "pixels"
    of_sounds = True

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((pixels - target).square() + self.epsilon**2).sqrt().mean() - self.epsilon


class Config(TermConfig):
    """Rounded mean absolute error."""

    kind: Literal["charbonnier"] = "charbonnier"
    epsilon: float = Field(1e-3, gt=0)
    """Errors below this count squared; pixels are in [-1, 1], a grey level is 0.0078."""

    def build(self) -> Charbonnier:
        return Charbonnier(self.epsilon)
