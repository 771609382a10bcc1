"""diffusers.AutoencoderOobleck: Stable Audio's autoencoder of sounds, a Gaussian posterior (Evans et al. 2024)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from diffusers import AutoencoderOobleck
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.config import check_lengths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels
from ldm_vae.core.validation import check_parameters

Times = Annotated[int, Field(gt=0, le=64)]


class Config(Part):
    """Shape of an Oobleck, in diffusers' names; the hop, samples of a latent position, is the product of
    downsampling_ratios. Latents have half as many channels as encoder_hidden_size."""

    kind: Literal["oobleck"] = "oobleck"
    audio_channels: Annotated[int, Field(gt=0, le=64)] = 2
    """Channels of a sound: 1 mono, 2 stereo."""
    sampling_rate: Annotated[int, Field(gt=0, le=2**20)] = 44100
    """Samples a second, those of data.sample_rate."""
    encoder_hidden_size: Channels = 128
    """Width of the encoder's first layer, and of its output: mean and scale of the latents, each half of it."""
    decoder_channels: Channels = 128
    """Width of the decoder's last layer."""
    downsampling_ratios: tuple[Times, ...] = (2, 4, 4, 8, 8)
    """Strides, even, first to last; the decoder has them from the last to the first."""
    channel_multiples: tuple[Times, ...] = (1, 2, 4, 8, 16)
    """Widths behind each stride in encoder_hidden_size and decoder_channels."""

    @property
    def in_channels(self) -> int:
        """Channels of a sample, as of every model."""
        return self.audio_channels

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not self.downsampling_ratios:
            raise ValueError("downsampling_ratios: expected at least one stride, got none")
        if odd := [stride for stride in self.downsampling_ratios if stride % 2]:
            raise ValueError(
                f"downsampling_ratios: expected even strides, which the decoder takes back whole, got {odd[0]}"
            )
        if self.encoder_hidden_size % 2:
            raise ValueError(f"encoder_hidden_size: expected an even width, got {self.encoder_hidden_size}")
        check_lengths({"downsampling_ratios": self.downsampling_ratios, "channel_multiples": self.channel_multiples})
        for name in ("encoder_hidden_size", "decoder_channels"):
            check_parameters([getattr(self, name) * times for times in self.channel_multiples], 4, name)
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        lists = {name: list(getattr(self, name)) for name in ("downsampling_ratios", "channel_multiples")}
        return self.model_dump(exclude={"kind"}) | lists | {"decoder_input_channels": self.encoder_hidden_size // 2}

    def build(self) -> AutoencoderOobleck:
        """A randomly initialised network; its pipelines take z as it is."""
        return AutoencoderOobleck(**self.shape())

    def bottleneck(self, vae: AutoencoderOobleck) -> Bottleneck:
        return GaussianBottleneck(vae)
