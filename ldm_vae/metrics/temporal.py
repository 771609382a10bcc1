"""Errors of motion: of the difference between a frame and the next, in grey levels of 255, per clip.

With e_t the error of frame t, what a reconstruction makes of the difference of two frames is wrong by e_{t+1} - e_t:

    temporal_l1  mean |e_{t+1} - e_t|             of sharp motion that is blurred, and of flicker
    flicker      sqrt(mean (e_{t+1} - e_t)^2)     0 for an error that stays as it is, however large

over pixels, colours and pairs of frames (definitions of this toolkit, of no published table). For an error drawn anew
in each frame, of deviation s, flicker is sqrt(2) s (and temporal_l1 2 s / sqrt(pi), where it is Gaussian); steady
errors leave it below sqrt(2) times the clip's RMS error.

Legend: B batch, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import torch

from ldm_vae.metrics.metric import ClipMetric
from ldm_vae.metrics.protocol import Pair

NAMES = ("temporal_l1", "flicker")


def differences(pair: Pair) -> torch.Tensor:
    """Differences of the errors of neighbouring frames, fp64 [B, T - 1, C, H, W] in grey levels."""
    error = pair.reconstruction.double() - pair.original.double()
    return error.view(-1, pair.frames, *error.shape[1:]).diff(dim=1)


def build(name: str) -> ClipMetric:
    """Build one of NAMES."""
    if name == "temporal_l1":
        return ClipMetric(name, "lower", lambda pair: differences(pair).abs().flatten(1).mean(dim=1))
    return ClipMetric(name, "lower", lambda pair: differences(pair).square().flatten(1).mean(dim=1).sqrt())
