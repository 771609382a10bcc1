"""Equivariance of encoding and decoding: E(T x) against T E(x), and D(T E(x)) against T x.

A convolutional encoder commutes with neither scaling nor rotation by itself; latents of autoencoders that do are learnt
faster by diffusion models (Kouzelis et al., "EQ-VAE", ICML 2025), which `perturbations.eq` trains for.

Clips are transformed frame by frame.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions (of clips t h w), T a
transformation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import finite, signals
from ldm_vae.autoencoder.geometry import downsampling_factor, geometry_of
from ldm_vae.data.alpha import resampled
from ldm_vae.metrics import psnr
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.perturbations.eq import moved


@dataclass(frozen=True)
class Transformation:
    """Resize by `scale` (bicubic, antialiased), then turn by so many quarter turns; of images and of latents."""

    scale: float = 1.0
    turns: int = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, channels, rows, columns], of clips with frames before the rows => moved likewise."""
        height, width = (round(self.scale * side) for side in x.shape[-2:])
        found = moved(signals.frames_of(x), height, width, self.turns)
        return found if x.ndim == 4 else signals.clips_of(found, x.shape[2])


TRANSFORMATIONS = {
    "scale_0.5": Transformation(scale=0.5),
    "rotate_90": Transformation(turns=1),
    "rotate_180": Transformation(turns=2),
    "rotate_270": Transformation(turns=3),
}


@dataclass(frozen=True)
class Equivariance:
    """Per image, fp64 [B]: latent, the relative squared error |E(T x) - T E(x)|^2 / |E(T x) - m|^2 (0 where they
    commute, 1 where each channel's mean would do as well as T E(x)); psnr, of D(T E(x)) against T x in dB on 8 bits."""

    latent: torch.Tensor
    psnr: torch.Tensor


def applicable(height: int, width: int, scales: bool = True) -> dict[str, Transformation]:
    """Those of TRANSFORMATIONS that a latent of h x w positions can undergo: one position has neither scale nor
    direction, and half of an odd number of positions is none.

    scales: the network takes images of other sizes too.
    """
    if height * width == 1:
        return {}
    return {
        name: transformation
        for name, transformation in TRANSFORMATIONS.items()
        if all((transformation.scale * side).is_integer() for side in (height, width))
        and (scales or transformation.scale == 1)
    }


@torch.no_grad()
def equivariance_error(
    vae: Any,
    images: torch.Tensor,
    center: torch.Tensor | None = None,
    transformations: Mapping[str, Transformation] | None = None,
    alpha: bool = False,
) -> dict[str, Equivariance]:
    """Encode images [B, C, H, W] or clips [B, C, T, H, W] in [-1, 1] before and behind each transformation (default:
    all that apply).

    center: mean of each channel over the data [c], the m of the relative error, so that a shift of the latent space
    makes no error small; the batch's own if it is not given. The mode of the posterior is compared. alpha: the fourth
    channel of the images is straight alpha.
    """
    factor = downsampling_factor(vae)
    if transformations is None:
        whole = geometry_of(vae).side is None
        transformations = applicable(images.shape[-2] // factor, images.shape[-1] // factor, whole)
    mean = finite.encode(vae, images).mean
    m = mean.double().flatten(2).mean(dim=(0, 2)) if center is None else center.double().to(mean.device)
    found = {}
    for name, transformation in transformations.items():
        target, moved = _of_images(transformation, images, alpha), transformation(mean)
        encoded = finite.encode(vae, target).mean.double()
        error = (encoded - moved.double()).square().flatten(1).sum(dim=1)
        size = (encoded.flatten(2) - m.view(-1, 1)).square().flatten(1).sum(dim=1)
        pair = PINNED.pair(target, finite.decode(vae, moved), alpha=alpha)
        found[name] = Equivariance(error / size.clamp(min=1e-300), psnr.build().values(pair))
    return found


def _of_images(transformation: Transformation, images: torch.Tensor, alpha: bool) -> torch.Tensor:
    """images [B, C, H, W] in [-1, 1] transformed; without mixing in invisible colour where they have alpha."""
    if not alpha:
        return transformation(images)
    found = 2 * resampled((signals.frames_of(images) + 1) / 2, transformation) - 1
    return found if images.ndim == 4 else signals.clips_of(found, images.shape[2])
