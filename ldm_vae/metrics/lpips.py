"""LPIPS (Zhang et al., CVPR 2018, version 0.1): AlexNet is reported, since VGG is what networks are trained on."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ldm_vae.data.alpha import three_channels
from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import PINNED, Pair, Protocol


def lpips(network: Any, original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """original and reconstruction [B, C, H, W], pixels in [-1, 1], C 1 or 3 => distances [B]."""
    x, y = (three_channels(image.float()) for image in (original, reconstruction))
    distances: torch.Tensor = network(x, y)
    return distances.flatten()


def build(
    net: Literal["alex", "vgg"], device: torch.device, weights: str | None = None, protocol: Protocol = PINNED
) -> ImageMetric:
    """Raises WorkError when the trunk cannot be had (ldm_vae.perceptual.pretrained says what to do)."""
    from ldm_vae.perceptual.lpips import LPIPS, SMALLEST
    from ldm_vae.perceptual.pretrained import load_lpips  # only who measures LPIPS loads its package

    network = load_lpips(net, weights).to(device)

    def measure(pair: Pair) -> torch.Tensor:
        if protocol.lpips == "floats":
            return lpips(network, pair.raw_original, pair.raw_reconstruction)
        return lpips(network, pair.original / 127.5 - 1, pair.reconstruction / 127.5 - 1)

    def where(pair: Pair) -> torch.Tensor:
        return LPIPS(network, SMALLEST[net]).spatial_map(pair.reconstruction / 127.5 - 1, pair.original / 127.5 - 1)

    return ImageMetric(f"lpips_{net}", "lower", measure, where)
