"""diffusers.AutoencoderDC: a deep compression autoencoder (Chen et al. 2024), by default SANA's; without posterior."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from diffusers import AutoencoderDC
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, PointBottleneck
from ldm_vae.autoencoder.config import check_lengths, check_shortcuts, check_widths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters

Block = Literal["ResBlock", "EfficientViTBlock"]
Scales = tuple[Annotated[int, Field(gt=0, le=31)], ...]
"""Sides of kernels."""
BLOCKS: tuple[Block, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SCALES: tuple[Scales, ...] = ((), (), (), (5,), (5,), (5,))


class Config(Part):
    """Shape of a deep compression autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    kind: Literal["dc"] = "dc"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 32
    """Channels c of the latent; divides the last widths."""
    attention_head_dim: Channels = 32
    """Width of a head; divides the width of every EfficientViTBlock."""
    encoder_block_types: tuple[Block, ...] = BLOCKS
    """Blocks of each resolution of the encoder, first to last: convolutions, or linear attention and a gated one."""
    decoder_block_types: tuple[Block, ...] = BLOCKS
    """Blocks of each resolution of the decoder, from the full one down, as all lists of the decoder."""
    encoder_block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512, 1024, 1024)
    """Widths of the encoder; each step but the last halves the resolution."""
    decoder_block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512, 1024, 1024)
    """Widths of the decoder."""
    encoder_layers_per_block: tuple[Layers, ...] = (2, 2, 2, 3, 3, 3)
    """Blocks per resolution of the encoder; with 0 at the full resolution it begins at the half."""
    decoder_layers_per_block: tuple[Layers, ...] = (3, 3, 3, 3, 3, 3)
    """Blocks per resolution of the decoder; likewise."""
    encoder_qkv_multiscales: tuple[Scales, ...] = SCALES
    """Kernels that gather keys, queries and values, per resolution of the encoder: odd, for EfficientViTBlocks."""
    decoder_qkv_multiscales: tuple[Scales, ...] = SCALES
    """Those of the decoder."""
    downsample_block_type: Literal["conv", "pixel_unshuffle"] = "conv"
    """Halving of the resolution: a strided convolution, or one before space to depth."""
    upsample_block_type: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    """Doubling of the resolution: a convolution after nearest neighbours, or before depth to space."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        lists = ("block_out_channels", "block_types", "layers_per_block", "qkv_multiscales")
        fields = {
            f"{side}_{name}": getattr(self, f"{side}_{name}") for side in ("encoder", "decoder") for name in lists
        }
        if not self.encoder_block_out_channels:
            raise ValueError("encoder_block_out_channels: expected at least one width, got none")
        check_lengths(fields)
        for side in ("encoder", "decoder"):
            widths, types, layers, scales = (fields[f"{side}_{name}"] for name in lists)
            self._check_side(side, widths, types, layers, scales)
        return self

    def _check_side(self, side: str, widths: Any, types: Any, layers: Any, scales: Any) -> None:
        name = f"{side}_block_out_channels"
        if 0 in layers[1:-1] or layers == (0,):
            raise ValueError(
                f"{side}_layers_per_block: expected 0 at the full or the lowest of several resolutions at most, got "
                f"{list(layers)}"
            )
        used = widths[int(layers[0] == 0) :]  # the full resolution's own width is no layer's then
        attention = [width for width, kind, count in zip(widths, types, layers, strict=True)
                     if kind == "EfficientViTBlock" and count]  # fmt: skip
        check_shortcuts(used, self.latent_channels, name)
        if attention:
            check_widths(attention, self.attention_head_dim, name, "attention_head_dim")
        if side == "encoder" and self.downsample_block_type == "pixel_unshuffle":
            check_widths([4, *used[int(layers[0] > 0) :]], 4, name, "the pixels of pixel_unshuffle,")
        if any(size % 2 == 0 for sizes in scales for size in sizes):
            raise ValueError(f"{side}_qkv_multiscales: expected odd sizes of kernels, got {list(map(list, scales))}")
        check_parameters(widths, max(layers), name)

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderDC:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        return AutoencoderDC(**self.shape(), scaling_factor=1.0)

    def bottleneck(self, vae: AutoencoderDC) -> Bottleneck:
        return PointBottleneck()
