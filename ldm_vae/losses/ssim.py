"""Structural dissimilarity, 1 - SSIM (Wang et al., IEEE TIP 2004; as a loss Zhao et al., IEEE TCI 2017).

The arithmetic is that of the metric (ldm_vae/perceptual/ssim.py), on a grey scale from 0 to 1 without rounding. It sees
structure and not its colour or level well: a companion of l1, no substitute.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.ssim import WINDOW, ssim


class SSIM(nn.Module):
    """1 - mean SSIM of pixels and target [B, C, H, W] in [-1, 1]; computed in fp64, between 0 and 2."""

    domain = "pixels"

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if min(pixels.shape[2:]) < WINDOW:
            raise UsageError(f"losses.ssim: expected crops of at least {WINDOW} px, got {min(pixels.shape[2:])}")
        with torch.autocast(pixels.device.type, enabled=False):
            return 1 - ssim((pixels + 1) / 2, (target + 1) / 2, data_range=1.0).mean().to(pixels.dtype)


class Config(TermConfig):
    """1 - SSIM."""

    kind: Literal["ssim"] = "ssim"

    def build(self) -> SSIM:
        return SSIM()
