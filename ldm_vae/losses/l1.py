"""Mean absolute error, the reconstruction term of latent-diffusion (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.losses import TermConfig


class L1(nn.Module):
    """mean |pixels - target|."""

    domain = "pixels"
    of_sounds = True

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pixels - target).abs().mean()


class Config(TermConfig):
    """Mean absolute error."""

    kind: Literal["l1"] = "l1"

    def build(self) -> L1:
        return L1()
