"""diffusers.VQModel: a codebook between encoder and decoder. The quantizer says how it is trained, or what it holds."""

from __future__ import annotations

from typing import Any, Literal

from diffusers import VQModel
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck
from ldm_vae.autoencoder.config import check_layers, check_widths
from ldm_vae.core.config import Part, choice
from ldm_vae.core.numbers import Channels, Layers
from ldm_vae.core.validation import check_parameters
from ldm_vae.quantizers.vq import Config as VQConfig


class Config(Part):
    """Shape of a vector-quantised autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    kind: Literal["vq"] = "vq"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 4
    """Channels of a code; also those between encoder and decoder."""
    num_vq_embeddings: int = Field(16384, gt=1, le=2**24)
    """Codes K in the codebook."""
    block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512)
    """Widths per resolution, first to last; each step but the last halves the resolution."""
    layers_per_block: Layers = 2
    """Residual blocks per resolution (the decoder has one more)."""
    norm_num_groups: Channels = 32
    """Groups of every GroupNorm; divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""
    quantizer: choice("ldm_vae.quantizers", default="vq") = VQConfig()  # type: ignore[valid-type]
    """The codebook, and how it is trained."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_widths(self.block_out_channels, self.norm_num_groups)
        check_layers(self.layers_per_block, self.block_out_channels)
        check_parameters(self.block_out_channels, self.layers_per_block)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind", "quantizer"})

    def build(self) -> VQModel:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        blocks = len(self.block_out_channels)
        return VQModel(
            **self.shape() | {"out_channels": self.in_channels},
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            scaling_factor=1.0,
        )

    def bottleneck(self, vae: VQModel) -> Bottleneck:
        bottleneck: Bottleneck = self.quantizer.build(vae)
        return bottleneck
