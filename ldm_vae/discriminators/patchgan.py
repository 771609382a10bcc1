"""PatchGAN: one logit per overlapping patch (Isola et al. 2017, section 3.2.2), of images or of clips.

Legend: B batch, C image channels, T frames, H W pixels, T' H' W' patches.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.discriminators import Discriminator

Norm = Literal["group", "spectral", "none", "batch", "sync_batch"]


class Config(Part):
    """PatchGAN discriminator."""

    kind: Literal["patchgan"] = "patchgan"
    width: Channels = 64
    """Channels of the first layer; doubled by each further layer up to 8 times."""
    layers: Layers = 3
    """Layers of stride 2: the side of a patch is 16, 34, 70, 142 px for 1, 2, 3, 4."""
    norm: Norm = "group"
    """group, spectral and none do not depend on the other images, so that any number of processes and micro-batches
    trains the same network; batch (as published) makes the result depend on the micro-batch of a process; sync_batch,
    which needs GPUs, on that of all processes."""
    dimensions: int = Field(2, ge=2, le=3)
    """2: each frame of a clip is judged by itself; 3: clips are, by convolutions over time, which halve it in the first
    two layers (Open-Sora Plan's). A patch of 3 layers then sees 31 frames, of 2 layers 23."""

    def build(self, in_channels: int = 3) -> PatchGAN:
        return PatchGAN(in_channels, self.width, self.layers, self.norm, self.dimensions)


class PatchGAN(Discriminator):
    """images [B, C, H, W] => logits [B, 1, H', W'], or clips [B, C, T, H, W] => logits [B, 1, T', H', W'], one per
    patch; higher means more real."""

    def __init__(self, in_channels: int, width: int, layers: int, norm: Norm, dimensions: int = 2) -> None:
        super().__init__()
        self.domain = "clips" if dimensions == 3 else "pixels"
        # a layer's stride in space, and in time
        modules: list[nn.Module] = [_convolution(in_channels, width, (2, 2), "none", dimensions), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            previous, channels = channels, width * min(2**layer, 8)
            strides = (2 if layer < layers else 1, 2 if layer == 1 < layers else 1)
            modules.append(_convolution(previous, channels, strides, norm, dimensions))
            if norm not in ("spectral", "none"):
                modules.append(_normalisation(norm, channels, dimensions))
            modules.append(nn.LeakyReLU(0.2))
        last: Norm = "spectral" if norm == "spectral" else "none"
        self.network = nn.Sequential(*modules, _convolution(channels, 1, (1, 1), last, dimensions))
        self.train()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return at_least_fp32(logits)


def _convolution(inputs: int, outputs: int, strides: tuple[int, int], norm: Norm, dimensions: int) -> nn.Module:
    space, time = strides
    bias = norm not in ("batch", "sync_batch")
    convolution: nn.Conv2d | nn.Conv3d
    if dimensions == 3:  # of 3 frames and not of 4: an image, a clip of one frame, then has its logits too
        convolution = nn.Conv3d(inputs, outputs, (3, 4, 4), (time, space, space), padding=1, bias=bias)
    else:
        convolution = nn.Conv2d(inputs, outputs, 4, space, padding=1, bias=bias)
    nn.init.normal_(convolution.weight, 0.0, 0.02)  # as published (DCGAN's)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution) if norm == "spectral" else convolution


def _normalisation(norm: Norm, channels: int, dimensions: int) -> nn.Module:
    if norm == "group":
        # 32 groups at the published widths; never groups of one channel, where the bias before them would be dead
        return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)
    batch = nn.BatchNorm3d if dimensions == 3 else nn.BatchNorm2d
    layer = (nn.SyncBatchNorm if norm == "sync_batch" else batch)(channels)
    nn.init.normal_(layer.weight, 1.0, 0.02)
    return layer
