"""diffusers.UNet2DModel: convolutions with skips, attention where the latent is small; latents of any shape."""

from __future__ import annotations

from typing import Literal

from diffusers import UNet2DModel
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.autoencoder.config import check_levels, check_widths
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.core.numbers import Channels, Layers


class Config(Part):
    """Shape of a U-Net, in diffusers' names."""

    kind: Literal["unet"] = "unet"
    block_out_channels: tuple[Channels, ...] = (128, 256, 512)
    """Widths per resolution, first to last; each step but the first halves the resolution."""
    layers_per_block: Layers = Field(2, gt=0)
    """Residual blocks per resolution."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Which of the resolutions have self-attention, the full one being 0."""
    attention_head_dim: int = Field(32, gt=0)
    """Width of a head."""
    norm_num_groups: int = Field(32, gt=0)
    """Groups of every GroupNorm; divides every width."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_widths(self.block_out_channels, self.norm_num_groups)
        check_levels(self.attention_levels, self.block_out_channels)
        return self

    def build(self, channels: int, size: tuple[int, int], classes: int) -> UNet2DModel:
        """A network for latents [channels, *size].

        Raises:
            UsageError: the size cannot be halved so often.
        """
        levels = len(self.block_out_channels)
        if any(side % 2 ** (levels - 1) for side in size):
            raise UsageError(
                f"denoiser.block_out_channels: {levels} widths halve the latent {levels - 1} times, which "
                f"{size[0]} x {size[1]} cannot be"
            )
        attends = [level in self.attention_levels for level in range(levels)]
        network = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            num_class_embeds=classes + 1,
        )
        nn.init.zeros_(network.conv_out.weight)  # it begins by saying nothing
        nn.init.zeros_(network.conv_out.bias)
        return network
