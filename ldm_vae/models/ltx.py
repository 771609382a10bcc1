"""diffusers.AutoencoderKLLTXVideo: an autoencoder of clips at f = 32 and t = 8 whose latents share one variance
(HaCohen et al. 2024), by default that of LTX-Video 0.9. Its encoder is causal, its decoder sees later frames."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from diffusers import AutoencoderKLLTXVideo
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.config import check_clip_parameters, check_lengths
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers

MOST = 4  # samplings: 16 frames a latent frame


class Config(Part):
    """Shape of LTX-Video's autoencoder, in diffusers' names; f = patch_size x 2 ** (number of samplings), t = 2 ** (the
    same number)."""

    kind: Literal["ltx"] = "ltx"
    in_channels: Channels = 3
    """Channels of an image."""
    latent_channels: Channels = 128
    """Channels c of the latent."""
    block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512)
    """Widths of the encoder, first to last."""
    decoder_block_out_channels: tuple[Channels, ...] = (128, 256, 512, 512)
    """Widths of the decoder, from the full resolution down, as all lists of the decoder."""
    layers_per_block: tuple[Layers, ...] = (4, 3, 3, 3, 4)
    """Residual blocks per width of the encoder, and those of its middle."""
    decoder_layers_per_block: tuple[Layers, ...] = (4, 3, 3, 3, 4)
    """Those of the decoder."""
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    """Whether a width of the encoder ends in a sampling: half the height, the width and the frames."""
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    """Those of the decoder."""
    patch_size: Annotated[int, Field(gt=0, le=16)] = 4
    """Side of the squares of pixels that the network sees as one."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not self.block_out_channels:
            raise ValueError("block_out_channels: expected at least one width, got none")
        names = ("block_out_channels", "decoder_block_out_channels", "spatio_temporal_scaling",
                 "decoder_spatio_temporal_scaling")  # fmt: skip
        check_lengths({name: getattr(self, name) for name in names})
        for name in ("layers_per_block", "decoder_layers_per_block"):
            if len(layers := getattr(self, name)) != len(self.block_out_channels) + 1:
                raise ValueError(
                    f"{name}: expected one number for each of {len(self.block_out_channels)} widths and one for the "
                    f"middle, got {len(layers)}"
                )
            widths = name.replace("layers_per_block", "block_out_channels")
            check_clip_parameters(getattr(self, widths), max(layers), widths)
        ours, theirs = sum(self.spatio_temporal_scaling), sum(self.decoder_spatio_temporal_scaling)
        if ours != theirs or ours > MOST:
            raise ValueError(
                f"decoder_spatio_temporal_scaling: expected as many samplings as spatio_temporal_scaling has, {MOST} "
                f"at most, got {theirs} and {ours}"
            )
        return self

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderKLLTXVideo:
        """A randomly initialised network whose buffers latents_mean and latents_std are an identity until they are
        measured."""
        blocks = len(self.block_out_channels)
        return AutoencoderKLLTXVideo(
            **self.shape() | {"out_channels": self.in_channels},
            down_block_types=("LTXVideoDownBlock3D",) * blocks, downsample_type=("conv",) * blocks,
            upsample_residual=(False,) * blocks, upsample_factor=(1,) * blocks,
            decoder_inject_noise=(False,) * (blocks + 1),
        )  # fmt: skip

    def bottleneck(self, vae: AutoencoderKLLTXVideo) -> Bottleneck:
        return GaussianBottleneck(vae)
