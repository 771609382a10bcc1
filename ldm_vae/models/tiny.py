"""diffusers.AutoencoderTiny: a few plain convolutions, distilled from a larger VAE for previews (the TAESD idea).

Its latents are the teacher's as a diffusion model sees them (normalised), so a pipeline swaps it in with scaling 1.
"""

from __future__ import annotations

from typing import Any, Literal

from diffusers import AutoencoderTiny
from pydantic import model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, PointBottleneck
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers


class Config(Part):
    """Shape of a tiny autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    kind: Literal["tiny"] = "tiny"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 4
    """Channels c of the latent: the teacher's."""
    encoder_block_out_channels: tuple[Channels, ...] = (64, 64, 64, 64)
    """Widths of the encoder, first to last; each step but the first halves the resolution."""
    decoder_block_out_channels: tuple[Channels, ...] = (64, 64, 64, 64)
    """Widths of the decoder; each step but the last doubles the resolution."""
    num_encoder_blocks: tuple[Layers, ...] = (1, 3, 3, 3)
    """Residual blocks per width of the encoder."""
    num_decoder_blocks: tuple[Layers, ...] = (3, 3, 3, 1)
    """Residual blocks per width of the decoder."""

    @model_validator(mode="after")
    def _one_f(self) -> Config:
        widths = (self.encoder_block_out_channels, self.decoder_block_out_channels)
        lengths = [len(part) for part in (*widths, self.num_encoder_blocks, self.num_decoder_blocks)]
        if len(set(lengths)) > 1:
            raise ValueError(f"expected as many widths as numbers of blocks, and one f on both sides, got {lengths}")
        for name in ("encoder_block_out_channels", "decoder_block_out_channels"):
            if len(set(getattr(self, name))) > 1:  # nothing of the class goes from one width to another
                raise ValueError(f"{name}: expected equal widths, got {', '.join(map(str, getattr(self, name)))}")
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderTiny:
        """A randomly initialised network, scaling_factor 1: its latents are normalised already."""
        return AutoencoderTiny(**self.shape() | {"out_channels": self.in_channels})

    def bottleneck(self, vae: AutoencoderTiny) -> Bottleneck:
        return PointBottleneck()
