"""Mean squared error: the Gaussian likelihood with a fixed variance; smoother than l1 (the sd-vae-ft-mse recipe)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.losses import TermConfig


class L2(nn.Module):
    """mean (pixels - target)^2."""

    domain = "pixels"
    of_sounds = True

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pixels - target).square().mean()


class Config(TermConfig):
    """Mean squared error."""

    kind: Literal["l2"] = "l2"

    def build(self) -> L2:
        return L2()
