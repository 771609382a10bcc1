"""Peak signal-to-noise ratio in dB, per image on the 8-bit range, then averaged over images.

(Averaging the squared error first and taking one logarithm gives a lower number: the mean over images is what papers
mostly report.)
"""

from __future__ import annotations

import torch

from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import PINNED, Pair, Protocol

SMALLEST_MSE = 255.0**2 * 1e-10  # identical images count as 100 dB, so that no mean is infinite and JSON holds no inf


def psnr(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """original and reconstruction [B, C, H, W] on the 0..255 scale => dB [B], at most 100."""
    mse = (original.double() - reconstruction.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / mse.clamp(min=SMALLEST_MSE))


def _quantised(pair: Pair) -> torch.Tensor:
    return psnr(pair.original, pair.reconstruction)


def _floats(pair: Pair) -> torch.Tensor:
    return psnr(127.5 * (pair.raw_original + 1), 127.5 * (pair.raw_reconstruction.clamp(-1, 1) + 1))


def build(protocol: Protocol = PINNED) -> ImageMetric:
    return ImageMetric("psnr", "higher", _quantised if protocol.psnr == "quantised" else _floats)
