"""diffusers.AutoencoderVidTok: an autoencoder of clips whose blocks alternate between space and time, causal or not,
with a Gaussian posterior or finite scalar quantisation (Tang et al. 2024)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from diffusers import AutoencoderVidTok
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck, PointBottleneck
from ldm_vae.autoencoder.config import check_clip_parameters, check_layers
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers

LEVELS = 8  # of each channel of a code: what the class has
MOST = 8  # channels of a code: the class lists all codes, 16.8 million then


class Config(Part):
    """Shape of VidTok, in diffusers' names; f = 2 ** (number of multipliers - 1), t = 4."""

    kind: Literal["vidtok"] = "vidtok"
    in_channels: Channels = 3
    """Channels of an image."""
    z_channels: Channels = 4
    """Channels c of the latent."""
    ch: Channels = 128
    """Width of the full resolution."""
    ch_mult: tuple[Annotated[int, Field(gt=0, le=64)], ...] = (1, 2, 4, 4)
    """Widths per resolution in ch, first to last; each step but the last halves the resolution, the last two also the
    number of frames."""
    num_res_blocks: Layers = 2
    """Residual blocks of space, and of time, per resolution (the decoder has one more)."""
    is_causal: bool = True
    """No frame sees later ones, and clips have 1 + 4 k frames; otherwise 16 + 16 k."""
    regularizer: Literal["kl", "fsq"] = "kl"
    """kl: a Gaussian posterior. fsq: each channel is rounded to one of 8 levels, its gradient passed on; without
    terms of a posterior."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if len(self.ch_mult) < 3:
            raise ValueError(
                f"ch_mult: expected at least 3 resolutions, between which frames are halved twice, got "
                f"{len(self.ch_mult)}"
            )
        if self.regularizer == "fsq" and self.z_channels > MOST:
            raise ValueError(f"z_channels: expected at most {MOST} with regularizer fsq, got {self.z_channels}")
        check_layers(self.num_res_blocks, (1, *self.ch_mult), "num_res_blocks")
        check_clip_parameters([self.ch * times for times in self.ch_mult], self.num_res_blocks, "ch")
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderVidTok:
        """A randomly initialised network; its class names no normalisation."""
        codes = {"double_z": False, "codebook_size": LEVELS**self.z_channels} if self.regularizer == "fsq" else {}
        return AutoencoderVidTok(**self.shape() | codes | {"out_channels": self.in_channels})

    def bottleneck(self, vae: AutoencoderVidTok) -> Bottleneck:
        return PointBottleneck() if self.regularizer == "fsq" else GaussianBottleneck(vae)
