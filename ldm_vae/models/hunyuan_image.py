"""diffusers.AutoencoderKLHunyuanImage: a Gaussian posterior at f = 32; shortcuts without weights around samplers."""

from __future__ import annotations

from typing import Any, Literal

from diffusers import AutoencoderKLHunyuanImage
from pydantic import model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.config import check_shortcuts, check_widths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters

GROUPS = 32  # of every GroupNorm of this class


class Config(Part):
    """Shape of HunyuanImage's autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    kind: Literal["hunyuan_image"] = "hunyuan_image"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 64
    """Channels c of the latent; the last width is a multiple of 2c."""
    block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512, 1024, 1024)
    """Widths per resolution, multiples of 32, first to last; each step but the last halves the resolution."""
    layers_per_block: Layers = 2
    """Residual blocks per resolution (the decoder has one more)."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_widths(self.block_out_channels, GROUPS, divisor="the norms' groups,")
        check_shortcuts(self.block_out_channels, 2 * self.latent_channels)
        check_parameters(self.block_out_channels, self.layers_per_block)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        ratio = 2 ** (len(self.block_out_channels) - 1)
        return self.model_dump(exclude={"kind"}) | {"spatial_compression_ratio": ratio}

    def build(self) -> AutoencoderKLHunyuanImage:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        published = {"out_channels": self.in_channels, "sample_size": 384}
        return AutoencoderKLHunyuanImage(**self.shape() | published, scaling_factor=1.0)

    def bottleneck(self, vae: AutoencoderKLHunyuanImage) -> Bottleneck:
        return GaussianBottleneck(vae)
