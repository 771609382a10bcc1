"""The shape of a KL autoencoder, in diffusers' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from diffusers import AutoencoderKL
from pydantic import model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters


def check_widths(widths: Sequence[int], groups: int) -> None:
    """Raise ValueError for widths that a GroupNorm cannot divide, or for none."""
    odd = [width for width in widths if width % groups]
    if odd or not widths:
        got = odd[0] if odd else "none"
        raise ValueError(f"block_out_channels: expected multiples of norm_num_groups {groups}, got {got}")


class AutoencoderConfig(Part):
    """Shape of a KL autoencoder, in diffusers' names; f = 2 ** (number of widths - 1).

    >>> from ldm_vae import AutoencoderConfig
    >>> shape = AutoencoderConfig(block_out_channels=(16, 32, 32), latent_channels=8, norm_num_groups=8)  # f4
    >>> shape.build().config.latent_channels
    8
    """

    kind: Literal["kl"] = "kl"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 4
    """Channels c of the latent."""
    block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512)
    """Widths per resolution, first to last; each step but the last halves the resolution."""
    layers_per_block: Layers = 2
    """Residual blocks per resolution (the decoder has one more)."""
    norm_num_groups: Channels = 32
    """Groups of every GroupNorm; divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""
    use_quant_conv: bool = True
    """A 1x1 convolution behind the encoder (SD, SDXL: yes; SD3, FLUX: no)."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder (SD, SDXL: yes; SD3, FLUX: no)."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        check_widths(self.block_out_channels, self.norm_num_groups)
        check_parameters(self.block_out_channels, self.layers_per_block)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderKL:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        blocks = len(self.block_out_channels)
        return AutoencoderKL(
            **self.shape() | {"out_channels": self.in_channels},
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            scaling_factor=1.0,
        )

    def bottleneck(self, vae: AutoencoderKL) -> Bottleneck:
        return GaussianBottleneck(vae)
