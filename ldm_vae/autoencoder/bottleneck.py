"""Bottleneck between encoder and decoder in training: a Gaussian, a point, or a codebook (ldm_vae/quantizers).

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.autoencoder.inward_clamp import inwards
from ldm_vae.autoencoder.latents import Moments


@dataclass(frozen=True)
class Codes:
    """Result of a quantizer.

    indices [B, *p], of several codebooks [B, q, *p]; before [B, c, *p] the encoder's vectors, with their graph, and
    after [B, c, *p] the codebook's rows, with the codebook's graph: of several levels those of each, one behind the
    other [B, levels * c, *p]; kl [B, *p] in nats against the uniform prior where codes are drawn; logits [B, c, *p] of
    each bit of the index where it has such.
    """

    indices: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    kl: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    levels: int = 1


@dataclass(frozen=True)
class Encoded:
    """Result of an encode: moments of q(z|x), the latents z that are decoded [B, c, h, w], and the codes where there is
    a codebook."""

    moments: Moments
    latents: torch.Tensor
    codes: Codes | None = None


class Bottleneck(nn.Module):
    """One encode and one decode of training; `gives` is what terms may need of it (posterior, codes, or point).

    Its buffers (a codebook's statistics) are in the checkpoint; the VAE is handed in, so that its own state stays
    exactly diffusers'.
    """

    gives: str
    noise_channels = 0  # of standard normal noise [B, n, h, w], keyed per image, that `encode` takes
    copied: tuple[str, ...] = ()  # parameters of the VAE that the averaged weights take over as they are

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def draw(self, moments: Moments, noise: torch.Tensor) -> Encoded:
        """Draw latents from stored moments, in place of `encode`."""
        raise NotImplementedError(f"{type(self).__name__} takes no stored moments")

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        with inwards(vae):
            return latents.decode(vae, z)

    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        """Move its state by all micro-batches of an update that was taken, and restore what must hold of the weights;
        figures for the log, the same on every rank."""
        return {}

    def leave_out(self) -> None:
        """Forget the micro-batches of an update that was not taken."""


class GaussianBottleneck(Bottleneck):
    """z = mean + sigma * noise, of an AutoencoderKL."""

    gives = "posterior"

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.noise_channels = latent_channels(vae)

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        return self.draw(latents.encode(vae, images), noise)

    def draw(self, moments: Moments, noise: torch.Tensor) -> Encoded:
        return Encoded(moments, moments.sample(noise.to(moments.mean)))


class PointBottleneck(Bottleneck):
    """z is what the encoder gives, of an AutoencoderTiny. (Its own `forward` rounds z to bytes, so that no gradient
    would reach the encoder.)"""

    gives = "point"

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        return self.draw(latents.encode(vae, images), noise)

    def draw(self, moments: Moments, noise: torch.Tensor) -> Encoded:
        return Encoded(moments, moments.mean)
