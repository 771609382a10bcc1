"""CausalOobleck: the shape of AutoencoderOobleck with causal convolutions, which encodes and decodes sounds as their
samples come (ldm_vae/autoencoder/causal_oobleck.py)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.causal_oobleck import CausalOobleck
from ldm_vae.autoencoder.config import check_lengths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels
from ldm_vae.core.validation import check_parameters

Times = Annotated[int, Field(gt=0, le=64)]
LONGEST = 2**16  # samples of a hop


class Config(Part):
    """Shape of a causal streaming codec, in AutoencoderOobleck's names. The hop, samples of a latent position, is the
    product of downsampling_ratios; over sampling_rate it is the latency."""

    kind: Literal["causal_oobleck"] = "causal_oobleck"
    audio_channels: Annotated[int, Field(gt=0, le=64)] = 1
    """Channels of a sound: 1 mono, 2 stereo."""
    sampling_rate: Annotated[int, Field(gt=0, le=2**20)] = 24_000
    """Samples a second, those of data.sample_rate."""
    decoder_input_channels: Channels = 32
    """Channels c of the latent."""
    encoder_hidden_size: Channels = 32
    """Width of the encoder at full rate."""
    decoder_channels: Channels = 32
    """Width of the decoder at full rate."""
    downsampling_ratios: tuple[Annotated[int, Field(ge=2, le=64)], ...] = (4, 4, 4, 5)
    """Strides, first to last; the decoder has them from the last to the first."""
    channel_multiples: tuple[Times, ...] = (1, 2, 4, 8)
    """Widths behind each stride in encoder_hidden_size and decoder_channels."""

    @property
    def in_channels(self) -> int:
        """Channels of a sample, as of every model."""
        return self.audio_channels

    @model_validator(mode="after")
    def _check(self) -> Config:
        lengths = {"downsampling_ratios": self.downsampling_ratios, "channel_multiples": self.channel_multiples}
        check_lengths(lengths)
        if not 1 < (hop := math.prod(self.downsampling_ratios)) <= LONGEST:
            raise ValueError(f"downsampling_ratios: expected a product from 2 to {LONGEST}, got {hop}")
        for name in ("encoder_hidden_size", "decoder_channels"):
            check_parameters([getattr(self, name) * times for times in self.channel_multiples], 4, name)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json."""
        lists = {name: list(getattr(self, name)) for name in ("downsampling_ratios", "channel_multiples")}
        return self.model_dump(exclude={"kind"}) | lists

    def build(self) -> CausalOobleck:
        """A randomly initialised network; z is taken as it is."""
        network: CausalOobleck = CausalOobleck(**self.shape())
        return network

    def bottleneck(self, vae: CausalOobleck) -> Bottleneck:
        return GaussianBottleneck(vae)
