"""diffusers.AsymmetricAutoencoderKL: an encoder like Stable Diffusion's and a larger decoder (Zhu et al. 2023).

Its decoder also has layers that see a masked image, for inpainting; a reconstruction does not run them, so that they do
not learn.
"""

from __future__ import annotations

from typing import Any, Literal

from diffusers import AsymmetricAutoencoderKL
from pydantic import model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.config import check_layers, check_lengths, check_widths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters


class Config(Part):
    """Shape of an asymmetric autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    kind: Literal["asymmetric"] = "asymmetric"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 4
    """Channels c of the latent."""
    down_block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512)
    """Widths of the encoder, first to last; each step but the last halves the resolution."""
    layers_per_down_block: Layers = 2
    """Residual blocks per resolution of the encoder."""
    up_block_out_channels: tuple[Channels, ...] = (192, 384, 768, 768)
    """Widths of the decoder, from the full resolution down."""
    layers_per_up_block: Layers = 3
    """Residual blocks per resolution of the decoder, less one."""
    norm_num_groups: Channels = 32
    """Groups of every GroupNorm; divides every width."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        sides = {
            "down_block_out_channels": self.layers_per_down_block,
            "up_block_out_channels": self.layers_per_up_block,
        }
        for name, layers in sides.items():
            check_widths(getattr(self, name), self.norm_num_groups, name)
            check_parameters(getattr(self, name), layers, name)
        check_layers(self.layers_per_down_block, self.down_block_out_channels, "layers_per_down_block")
        check_lengths({name: getattr(self, name) for name in sides})
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AsymmetricAutoencoderKL:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        blocks = len(self.down_block_out_channels)
        return AsymmetricAutoencoderKL(
            **self.shape() | {"out_channels": self.in_channels},
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            scaling_factor=1.0,
        )

    def bottleneck(self, vae: AsymmetricAutoencoderKL) -> Bottleneck:
        return GaussianBottleneck(vae)
