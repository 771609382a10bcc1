"""SSIM as the protocols compute it; the arithmetic is ldm_vae/perceptual/ssim.py."""

from __future__ import annotations

import torch

from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import PINNED, Pair, Protocol
from ldm_vae.perceptual.ssim import reflected_ssim, ssim, uniform_ssim


def _range_of_image(pair: Pair) -> torch.Tensor:
    """torchmetrics without a data_range, batch 1: floats as decoded, the larger of both images' ranges."""
    x, y = pair.raw_original, pair.raw_reconstruction
    ranges = torch.maximum(x.amax((1, 2, 3)) - x.amin((1, 2, 3)), y.amax((1, 2, 3)) - y.amin((1, 2, 3)))
    return reflected_ssim(x, y, ranges.double().view(-1, 1, 1, 1))


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => [0, 1], clamped; SSIM's luminance depends on where black is."""
    return ((pixels + 1) / 2).clamp(0, 1)


def build(protocol: Protocol = PINNED) -> ImageMetric:
    """The protocol's own: pinned (8-bit images), or on floats with one of three other ideas of range and window."""
    measures = {
        "pinned": lambda pair: ssim(pair.original, pair.reconstruction),
        "range_of_image": _range_of_image,
        "range_two": lambda pair: reflected_ssim(pair.raw_original, pair.raw_reconstruction.clamp(-1, 1), 2.0),
        "uniform_window": lambda pair: uniform_ssim(_unit(pair.raw_original), _unit(pair.raw_reconstruction), 1.0),
    }
    return ImageMetric("ssim", "higher", measures[protocol.ssim])
