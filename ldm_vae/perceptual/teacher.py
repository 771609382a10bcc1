"""Frozen teacher VAE; it encodes each batch once for all terms that ask.

Legend: B batch, C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

from functools import cache

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.core.frozen_module import Frozen


class Teacher(Frozen):
    """A loaded VAE, frozen and in fp32."""

    def __init__(self, source: str) -> None:
        super().__init__(load_autoencoder(source))
        self.normalisation = normalisation_of(self.network, f"VAE {source}")
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def forward(self, images: torch.Tensor, *, normalised: bool = False) -> torch.Tensor:
        """images [B, C, H, W] => the mean of its posterior [B, c, h, w], raw or as a diffusion model sees it."""
        if self._last is None or self._last[0] is not images:  # a term and a perturbation ask for the same batch
            with torch.autocast(images.device.type, enabled=False):
                self._last = (images, latents.encode(self.network, images.to(self.network.dtype)).mean)
        mean = self._last[1].to(images.dtype)
        return self.normalise(mean) if normalised else mean

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, c, h, w] => as a diffusion model sees it, without patches made into channels (FLUX.2's)."""
        return torch.pixel_shuffle(self.normalisation.apply(z), self.normalisation.patch)


@cache
def teacher(source: str) -> Teacher:
    """The teacher of that name, loaded once. Raises UsageError when it cannot be loaded."""
    return Teacher(source)
