"""Focal frequency loss (Jiang, Dai, Wu & Loy, ICCV 2021): squared error of the spectra, each frequency weighted by how
badly it is met. Against the softness of a pixel loss, which cares for low frequencies first.

Legend: B batch, C image channels, H W pixels and frequencies.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.losses import TermConfig


class FocalFrequency(nn.Module):
    """mean of w |F(pixels) - F(target)|^2, w = |F(pixels) - F(target)|^alpha over its largest in each channel of each
    image, without a gradient. F is the orthonormal 2-D DFT: with alpha 0 this is the mean squared error (Parseval)."""

    domain = "pixels"

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft2(pixels - target, norm="ortho")  # the transform is linear
        power: torch.Tensor = spectrum.real.square() + spectrum.imag.square()
        weight: torch.Tensor = power.detach().pow(self.alpha / 2)
        largest = weight.amax(dim=(2, 3), keepdim=True)
        loss: torch.Tensor = (weight / largest.clamp_min(torch.finfo(weight.dtype).tiny) * power).mean()
        return loss


class Config(TermConfig):
    """Focal frequency loss."""

    kind: Literal["focal_frequency"] = "focal_frequency"
    alpha: float = Field(1.0, ge=0)
    """Strength of the preference for badly met frequencies; 0: none."""

    def build(self) -> FocalFrequency:
        return FocalFrequency(self.alpha)
