"""Probes of an audit: the user's images, images at the ends of what a pixel can be, and latents to match.

Legend: N images, C image channels, R side, c latent channels, h w latent positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import check_resolution, image_channels, sample_size
from ldm_vae.autoencoder.preparation import Preparation, preparation_of
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.data.transforms import to_pixels
from ldm_vae.metrics.batches import image_batches, spread

LARGEST_SIDE = 512  # pixels: GroupNorm's statistics hardly change with the size, memory does


@dataclass(frozen=True)
class Probes:
    """Inputs of an audit: images [N, C, R, R] in [-1, 1] for the encoder, z [M, c, h, w] unscaled for the decoder, how
    many are real."""

    images: torch.Tensor
    z: torch.Tensor
    real: int

    def describe(self) -> str:
        """Description for a card: what the numbers were measured over."""
        side = self.images.shape[-1]
        real = f"{self.real} images and " if self.real else ""
        return f"{real}{len(self.images) - self.real} synthetic extremes of {side} px, {len(self.z)} latents"


def make_probes(
    vae: Any,
    data: str | None = None,
    preparation: Preparation | None = None,
    *,
    resolution: int | None = None,
    count: int = 8,
) -> Probes:
    """`count` images spread over DATA (none without it), synthetic extremes, and latents of all of them and beyond.

    preparation: how DATA is decoded; as the network records by default.

    Raises:
        UsageError: the network does not take images of this resolution whole.
    """
    side = sample_size(vae, LARGEST_SIDE) if resolution is None else resolution
    check_resolution(side, vae)
    channels = image_channels(vae)
    real = torch.empty(0, channels, side, side)
    if data is not None:
        source = (preparation or preparation_of({"": vae})).open(data)
        batches = image_batches(source, spread(len(source), count), side, batch_size=count)
        real = torch.cat([real, *(frames_of(to_pixels(batch.pixels)) for batch in batches)])
    images = torch.cat([real, extreme_images(channels, side)])
    return Probes(images, extreme_latents(means(vae, images)), len(real))


def extreme_images(channels: int, side: int) -> torch.Tensor:
    """[7, C, R, R]: black, white, one channel only, noise, two-valued noise, single-pixel checks, a steep edge."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(channels, side, side, generator=draw) * 2 - 1
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    first = torch.full((channels, side, side), -1.0)
    first[0] = 1.0
    checks = ((rows + columns) % 2 * 2.0 - 1.0).expand(channels, -1, -1)
    edge = torch.where(columns * 2 < side, -1.0, 1.0).expand(channels, -1, -1)
    return torch.stack([torch.full_like(noise, -1.0), torch.ones_like(noise), first, noise, noise.sign(), checks, edge])


@torch.no_grad()
def means(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Posterior means [N, c, h, w], one image at a time (an audit may run on full-size models)."""
    found = [latents.encode(vae, image[None].to(vae.device, vae.dtype)).mean.cpu() for image in images]
    return torch.cat(found)


def extreme_latents(z: torch.Tensor) -> torch.Tensor:
    """The latents of the images, and what a diffusion model may hand over in a bad step: noise of once and twice their
    spread, zeros, and every channel at plus or minus four standard deviations."""
    draw = torch.Generator().manual_seed(0)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    noise = torch.randn(2, *z.shape[1:], generator=draw) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    ends = torch.tensor([0.0, 4.0, -4.0]).view(3, 1, 1, 1).expand(3, *z.shape[1:])
    return torch.cat([z, mean + std * torch.cat([noise, ends]), torch.zeros_like(z[:1])])
