"""The shape of a KL autoencoder, in diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from diffusers import AutoencoderKL
from pydantic import model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters


def check_widths(
    widths: Sequence[int], groups: int, name: str = "block_out_channels", divisor: str = "norm_num_groups"
) -> None:
    """Raise ValueError for widths that a GroupNorm cannot divide, or for none."""
    odd = [width for width in widths if width % groups]
    if odd or not widths:
        got = odd[0] if odd else "none"
        raise ValueError(f"{name}: expected multiples of {divisor} {groups}, got {got}")


def check_layers(layers: int, widths: Sequence[int], name: str = "layers_per_block") -> None:
    """Raise ValueError for no residual block where one has to go from one width to another."""
    if not layers and len(set(widths)) > 1:
        raise ValueError(f"{name}: expected at least 1 for an encoder whose widths differ, got 0")


def check_clip_parameters(widths: Sequence[int], layers: int, name: str) -> None:
    """Raise ValueError as `check_parameters`, for kernels of 3 x 3 x 3."""
    check_parameters(widths, 3 * layers + 1, name)  # blocks and the middle: 2 (3 l + 1) + 1 = 3 (2 l + 1)


def check_lengths(fields: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError for fields of other lengths than the first: each has one value for each resolution, and encoder
    and decoder have one f."""
    (first, values), *others = fields.items()
    for name, one in others:
        if len(one) != len(values):
            raise ValueError(f"{name}: expected as many values as {first} has, {len(values)}, got {len(one)}")


def check_shortcuts(widths: Sequence[int], outputs: int, name: str = "block_out_channels") -> None:
    """Raise ValueError for widths that shortcuts without weights cannot join: those of a sampler average groups of four
    times a width, or repeat it, and that of an encoder's end averages groups of the last to its `outputs`."""
    for before, after in pairwise(widths):
        if 4 * before % after:
            raise ValueError(
                f"{name}: expected each to divide four times the one before it, got {after} after {before}"
            )
    if widths[-1] % outputs:
        raise ValueError(
            f"{name}: expected a last width that is a multiple of the encoder's {outputs} outputs (latent_channels), "
            f"got {widths[-1]}"
        )


def check_levels(levels: Sequence[int], widths: Sequence[int]) -> None:
    """Raise ValueError for levels of attention that are none of the resolutions."""
    if odd := [level for level in levels if not 0 <= level < len(widths)]:
        raise ValueError(
            f"attention_levels: expected numbers from 0 to {len(widths) - 1}, as block_out_channels has {len(widths)} "
            f"resolutions, got {odd[0]}"
        )


def block_types(levels: Sequence[int], count: int) -> dict[str, tuple[str, ...]]:
    """Names of the blocks of `count` resolutions, as diffusers' configs have them: with attention on these levels."""
    attention = ["Attn" if level in levels else "" for level in range(count)]
    return {
        "down_block_types": tuple(f"{attn}DownEncoderBlock2D" for attn in attention),
        "up_block_types": tuple(f"{attn}UpDecoderBlock2D" for attn in reversed(attention)),
    }


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
    """Self-attention in the middle, at the lowest resolution."""
    attention_levels: tuple[int, ...] = ()
    """Resolutions with self-attention behind each residual block, the full one being 0."""
    use_quant_conv: bool = True
    """A 1x1 convolution behind the encoder (SD, SDXL: yes; SD3, FLUX: no)."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder (SD, SDXL: yes; SD3, FLUX: no)."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        check_widths(self.block_out_channels, self.norm_num_groups)
        check_layers(self.layers_per_block, self.block_out_channels)
        check_levels(self.attention_levels, self.block_out_channels)
        check_parameters(self.block_out_channels, self.layers_per_block)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        blocks = block_types(self.attention_levels, len(self.block_out_channels))
        return self.model_dump(exclude={"kind", "attention_levels"}) | blocks

    def build(self) -> AutoencoderKL:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        return AutoencoderKL(**self.shape() | {"out_channels": self.in_channels}, scaling_factor=1.0)

    def bottleneck(self, vae: AutoencoderKL) -> Bottleneck:
        return GaussianBottleneck(vae)
