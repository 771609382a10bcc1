"""Error of the differences between successive frames: the temporal coherence loss of video matting (Sun et al., ACM MM
2021; Lin et al., WACV 2022, eq. 2). Against flicker, of which terms of single frames see nothing.

Legend: B batch, C image channels, T frames, H W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.losses import TermConfig


class TemporalDifference(nn.Module):
    """mean |d pixels - d target|^p over batch, channels, pixels and T - 1 differences, d x[t] = x[t + 1] - x[t]; 0 of
    clips of one frame."""

    domain = "clips"

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = (pixels - target).diff(dim=2)  # the difference is linear
        size = error.abs() if self.power == 1 else error.square()
        # not a mean: one frame has no differences, whose mean would be NaN
        return size.sum() / max(1, size.numel())


class Config(TermConfig):
    """Error of frame-to-frame differences."""

    kind: Literal["temporal_difference"] = "temporal_difference"
    norm: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared error."""

    def build(self) -> TemporalDifference:
        return TemporalDifference({"l1": 1, "l2": 2}[self.norm])
