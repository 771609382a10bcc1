"""Absolute error of Haar wavelet coefficients (Haar 1910; as a loss Huang et al., ICCV 2017): edges and texture of each
scale count by themselves.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig


class Haar(nn.Module):
    """mean |W(pixels - target)| over all coefficients of W, the orthonormal 2-D transform of so many levels; those of
    the coarsest average are among them."""

    domain = "pixels"

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        step = 2**self.levels
        if any(side % step for side in pixels.shape[2:]):
            height, width = pixels.shape[2:]
            raise UsageError(f"losses.haar: expected crops of multiples of {step} px, got {height} x {width}")
        average, total = pixels - target, pixels.new_zeros(())
        for _ in range(self.levels):
            average, *details = bands(average)
            total = total + sum(band.abs().sum() for band in details)
        return (total + average.abs().sum()) / pixels.numel()


def bands(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [B, C, H, W] => average and details along columns, rows and both, each [B, C, H / 2, W / 2]."""
    a, b, c, d = (x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2


class Config(TermConfig):
    """Haar wavelet coefficients."""

    kind: Literal["haar"] = "haar"
    levels: int = Field(3, ge=1, le=16)
    """Halvings; crops are multiples of 2 ** levels."""

    def build(self) -> Haar:
        return Haar(self.levels)
