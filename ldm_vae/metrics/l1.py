"""Mean absolute error in grey levels of 255, per image."""

from __future__ import annotations

import torch

from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import Pair


def l1(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """original and reconstruction [B, C, H, W] on the 0..255 scale => grey levels [B]."""
    return (original.double() - reconstruction.double()).abs().flatten(1).mean(dim=1)


def _measure(pair: Pair) -> torch.Tensor:
    return l1(pair.original, pair.reconstruction)


def build() -> ImageMetric:
    return ImageMetric("l1", "lower", _measure)
