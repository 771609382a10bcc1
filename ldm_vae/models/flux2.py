"""diffusers.AutoencoderKLFlux2: an AutoencoderKL whose pipelines see 2 x 2 positions as one, normalised per channel by
the statistics of a batch norm. No forward runs that norm; they are measured and written when training has ended."""

from __future__ import annotations

from typing import Any, Literal

from diffusers import AutoencoderKLFlux2
from pydantic import model_validator

from ldm_vae.autoencoder.config import AutoencoderConfig, check_lengths, check_widths
from ldm_vae.core.numbers import Channels
from ldm_vae.core.validation import check_parameters


class Config(AutoencoderConfig):
    """Shape of FLUX.2's autoencoder, in diffusers' names: an AutoencoderKL's, with widths of the decoder."""

    kind: Literal["flux2"] = "flux2"  # type: ignore[assignment]
    latent_channels: Channels = 32
    """Channels c of the latent; a diffusion model sees 4c."""
    decoder_block_out_channels: tuple[Channels, ...] | None = None
    """Widths of the decoder, first to last; default: those of the encoder."""

    @model_validator(mode="after")
    def _check_decoder(self) -> Config:
        if self.decoder_block_out_channels is not None:
            name, widths = "decoder_block_out_channels", self.decoder_block_out_channels
            check_lengths({"block_out_channels": self.block_out_channels, name: widths})
            check_widths(widths, self.norm_num_groups, name)
            check_parameters(widths, self.layers_per_block, name)
        return self

    def build(self) -> Any:
        """A randomly initialised network whose batch norm is an identity until it is measured."""
        return AutoencoderKLFlux2(**self.shape() | {"out_channels": self.in_channels})
