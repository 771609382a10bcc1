"""diffusers.AutoencoderKLWan: a causal autoencoder of clips, in chunks of one frame and of four (Wan 2025). By default
that of Wan 2.1; 2.2's has shortcuts without weights around its samplers and sees 2 x 2 pixels as one."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from diffusers import AutoencoderKLWan
from pydantic import Field, model_validator

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.config import check_clip_parameters, check_layers
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels, Layers

T = 4  # frames of a latent frame: encode takes so many at a time


class Config(Part):
    """Shape of Wan's autoencoder, in diffusers' names; f = 2 ** (number of multipliers - 1) x patch_size, t = 4."""

    kind: Literal["wan"] = "wan"
    in_channels: Channels = 3
    """Channels of an image."""
    z_dim: Channels = 16
    """Channels c of the latent."""
    base_dim: Channels = 96
    """Width of the full resolution."""
    decoder_base_dim: Channels | None = None
    """That of the decoder; default: the encoder's."""
    dim_mult: tuple[Annotated[int, Field(gt=0, le=64)], ...] = (1, 2, 4, 4)
    """Widths per resolution in base_dim, first to last; each step but the last halves the resolution."""
    num_res_blocks: Layers = 2
    """Residual blocks per resolution (the decoder has one more)."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """Whether a step halves the number of frames too: two of them do."""
    is_residual: bool = False
    """Shortcuts around samplers, as in Wan 2.2."""
    patch_size: Annotated[int, Field(gt=1, le=16)] | None = None
    """Side of the squares of pixels that the network sees as one; Wan 2.2: 2."""

    @property
    def factor(self) -> int:
        """f."""
        return int(2 ** (len(self.dim_mult) - 1)) * (self.patch_size or 1)

    @model_validator(mode="after")
    def _check(self) -> Config:
        steps = self.temperal_downsample
        if len(steps) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample: expected one value for each step between dim_mult's {len(self.dim_mult)} "
                f"resolutions, got {len(steps)}"
            )
        if 2 ** sum(steps) != T:
            raise ValueError(
                f"temperal_downsample: expected true twice, since the class encodes {T} frames at a time, got "
                f"{sum(steps)} times"
            )
        for name, base in (("base_dim", self.base_dim), ("decoder_base_dim", self.decoder_base_dim or self.base_dim)):
            widths = [base * times for times in self.dim_mult]
            check_layers(self.num_res_blocks, [base, *widths], "num_res_blocks")
            check_clip_parameters(widths, self.num_res_blocks, name)
            if self.is_residual:
                self._check_shortcuts(base, decodes=name != "base_dim")
            elif min(widths[1:]) < 2:
                raise ValueError(f"{name}: expected widths of at least 2, which each upsampling halves, got {base}")
        return self

    def _check_shortcuts(self, base: int, decodes: bool) -> None:
        """Shortcuts average groups of the values of a step, four pixels of one frame or of two, or repeat them."""
        values = [4 * (1 + halved) for halved in self.temperal_downsample]
        if decodes:
            mult, values = (self.dim_mult[-1], *self.dim_mult[::-1]), values[::-1]
        else:
            mult, values = (1, *self.dim_mult), [*values, 1]
        for (before, after), count in zip(pairwise(mult), values, strict=False):
            divided, by = (after * count, before) if decodes else (before * count, after)
            if divided % by:
                raise ValueError(
                    f"dim_mult: expected steps whose shortcuts come out even, got {after * base} behind "
                    f"{before * base} channels x {count} values in the {'decoder' if decodes else 'encoder'}"
                )

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        channels = self.in_channels * (self.patch_size or 1) ** 2
        return self.model_dump(exclude={"kind"}) | {"in_channels": channels}

    def build(self) -> AutoencoderKLWan:
        """A randomly initialised network whose latents_mean and latents_std are an identity until they are measured."""
        shape = {name: list(value) if isinstance(value, tuple) else value for name, value in self.shape().items()}
        return AutoencoderKLWan(
            **shape | {"out_channels": shape["in_channels"]},
            latents_mean=[0.0] * self.z_dim, latents_std=[1.0] * self.z_dim, scale_factor_spatial=self.factor,
            scale_factor_temporal=T,
        )  # fmt: skip

    def bottleneck(self, vae: AutoencoderKLWan) -> Bottleneck:
        return GaussianBottleneck(vae)
