"""Descript Audio Codec's network (Kumar et al., NeurIPS 2023), the one that transformers.DacModel carries: with a
`quantizer` residual, `ldm-vae export --target dac` writes such a model (ldm_vae/autoencoder/dac.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, PointBottleneck
from ldm_vae.autoencoder.dac import DacAutoencoder
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels
from ldm_vae.core.validation import check_parameters


class Config(Part):
    """Shape of a DAC, in transformers' names; the hop, samples of a latent position, is the product of
    downsampling_ratios. Latents have encoder_hidden_size * 2 ** strides channels."""

    kind: Literal["dac"] = "dac"
    sampling_rate: Annotated[int, Field(gt=0, le=2**20)] = 44_100
    """Samples a second, those of data.sample_rate; sounds are mono."""
    encoder_hidden_size: Channels = 64
    """Width of the encoder at full rate; it doubles behind each stride."""
    decoder_hidden_size: Channels = 1536
    """Width of the decoder's first layer; it halves behind each stride."""
    downsampling_ratios: tuple[Annotated[int, Field(ge=2, le=64)], ...] = (2, 4, 8, 8)
    """Strides, even, first to last; the decoder has them from the last to the first."""

    @property
    def in_channels(self) -> int:
        """Channels of a sample, as of every model."""
        return 1

    @model_validator(mode="after")
    def _check(self) -> Config:
        strides = self.downsampling_ratios
        if not 1 <= len(strides) <= 8:
            raise ValueError(f"downsampling_ratios: expected 1 to 8 strides, got {len(strides)}")
        if odd := [stride for stride in strides if stride % 2]:
            raise ValueError(
                f"downsampling_ratios: expected even strides, which the decoder takes back whole, got {odd[0]}"
            )
        if self.decoder_hidden_size % 2 ** len(strides):
            raise ValueError(
                f"decoder_hidden_size: expected a multiple of {2 ** len(strides)}, a half for each stride, got "
                f"{self.decoder_hidden_size}"
            )
        check_parameters(
            [self.encoder_hidden_size * 2**stage for stage in range(len(strides) + 1)], 4, "encoder_hidden_size"
        )
        check_parameters(
            [self.decoder_hidden_size >> stage for stage in range(len(strides) + 1)], 4, "decoder_hidden_size"
        )
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json."""
        return self.model_dump(exclude={"kind"}) | {"downsampling_ratios": list(self.downsampling_ratios)}

    def build(self) -> DacAutoencoder:
        """A randomly initialised network; z is taken as it is."""
        network: DacAutoencoder = DacAutoencoder(**self.shape())
        return network

    def bottleneck(self, vae: DacAutoencoder) -> Bottleneck:
        return PointBottleneck()
