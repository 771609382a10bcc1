"""Normalisation of latents: from z to what a diffusion model sees, and back.

Legend: c latent channels, t h w latent positions, n those of a sound, F latent frames with a mean and a deviation of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ldm_vae.autoencoder.families import VARIANTS, Layout
from ldm_vae.autoencoder.latents import LOGVAR_RANGE
from ldm_vae.autoencoder.patches import channels_first, positions_first
from ldm_vae.autoencoder.signals import clips_of, frames_of
from ldm_vae.core.errors import UsageError, WorkError

LEAST_VARIANCE = 2 * math.exp(LOGVAR_RANGE[0])  # of a posterior at the end of that range, and rounding: nothing

NormalisationKind = Literal["scale", "shift", "channel"]


@dataclass(frozen=True)
class Normalisation:
    """The one way from z to latents that a VAE names (in its config.json, or its buffers), and back.

    - scale:   z * scaling_factor (Stable Diffusion, SDXL, SANA);
    - shift:   (z - shift_factor) * scaling_factor (SD3, FLUX);
    - channel: (z - latents_mean) * scaling_factor / latents_std, the inverse of SDXL's
      z * latents_std / scaling_factor + latents_mean; without a scaling_factor (z - latents_mean) * (1 / latents_std),
      as pipelines of Wan and Qwen-Image have it (Qwen-Image-2.1's divide: a scaling_factor of 1).

    patch: side of the squares of positions whose values become channels (c, row, column) first: 2 of FLUX.2.
    frames: F, where latents_mean and latents_std are of each channel and latent frame, c * F values: 16 of Cosmos.
    sounds: z is [B, c, n] or [c, n].
    pipelines: the family of pipelines whose layout of those channels it is, where it is another (`families.VARIANTS`).

    >>> import torch
    >>> from ldm_vae import Normalisation
    >>> sd = Normalisation(scaling_factor=0.18215)
    >>> sd.kind, sd.undo(sd.apply(torch.ones(1, 4, 8, 8))).mean().item()
    ('scale', 1.0)
    """

    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    patch: int = 1
    pipelines: str | None = None
    frames: int = 1
    sounds: bool = False

    def __post_init__(self) -> None:
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ValueError("shift_factor and latents_mean are both set: latents would be shifted twice")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std are set together or not at all")
        if self.scaling_factor is None and self.latents_mean is None:
            raise ValueError("neither scaling_factor nor latents_mean is set")
        if self.pipelines is not None and self.pipelines not in [*VARIANTS]:
            raise ValueError(f"pipelines: expected one of {', '.join(VARIANTS)}, got {self.pipelines!r}")
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            value, divides = getattr(self, name), name in ("scaling_factor", "latents_std")
            for number in value if isinstance(value, tuple) else [] if value is None else [value]:
                if not math.isfinite(number) or (divides and number <= 0):
                    raise ValueError(f"{name}: expected a finite number{' above 0' if divides else ''}, got {number:g}")

    @property
    def kind(self) -> NormalisationKind:
        if self.latents_mean is not None:
            return "channel"
        return "scale" if self.shift_factor is None else "shift"

    def __repr__(self) -> str:
        names = ("scaling_factor", "shift_factor")
        said = [f"{name} {value:g}" for name in names if (value := getattr(self, name)) is not None]
        said += (
            [] if self.latents_mean is None else [f"mean and std of {len(self.latents_mean) // self.frames} channels"]
        )
        said += [f"of {self.frames} latent frames each"] if self.frames > 1 else []
        said += [f"{self.patch}x{self.patch} patches"] if self.patch > 1 else []
        return f"Normalisation({self.kind}: {', '.join(said)}{f', for {self.pipelines}' if self.pipelines else ''})"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Normalisation:
        """Make from a diffusers config (or a manifest): the keys that are absent or null count as not set.

        Raises:
            UsageError: it names two normalisations, or one by which nobody can divide; `where` is what has this config.
        """
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        try:
            return cls(
                scaling_factor=float(scale) if scale is not None else 1.0 if mean is None else None,
                shift_factor=None if shift is None else float(shift),
                latents_mean=None if mean is None else tuple(map(float, mean)),
                latents_std=None if std is None else tuple(map(float, std)),
                patch=int(config.get("patch") or 1),
                pipelines=config.get("pipelines"),
                frames=int(config.get("frames") or 1),
                sounds=bool(config.get("sounds")),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{where}: {error}; `ldm-vae export SRC OUT --stats DATA` measures it") from error

    @classmethod
    def from_statistics(
        cls, kind: NormalisationKind, mean: torch.Tensor, variance: torch.Tensor, patch: int = 1
    ) -> Normalisation:
        """Make from measured per-channel mean [c] and variance [c] (fp64) of the sampled latents, patchified if they
        are.

        The scalar variance is that of all elements together: E[variance_c] + Var[mean_c].

        Raises:
            WorkError: the latents, or of kind `channel` a channel of them, do not vary.
        """
        scalar_mean = float(mean.mean())
        # law of total variance over all elements
        scalar_variance = float(variance.mean() + mean.var(unbiased=False))
        varies = scalar_variance > LEAST_VARIANCE
        if not (varies and (kind != "channel" or bool((variance > LEAST_VARIANCE).all()))):
            what = "a channel of the latents does" if varies else "the latents do"
            raise WorkError(f"normalisation {kind}: {what} not vary, and nothing scales that to a variance of 1")
        if kind == "channel":
            return cls(1.0, None, tuple(mean.tolist()), tuple(variance.sqrt().tolist()), patch)
        return cls(1.0 / math.sqrt(scalar_variance), scalar_mean if kind == "shift" else None, patch=patch)

    def to_config(self) -> dict[str, Any]:
        """All four keys, the unused ones null, so that writing one normalisation erases any other; and the patch and
        its layout, where there are any."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": None if self.latents_mean is None else list(self.latents_mean),
            "latents_std": None if self.latents_std is None else list(self.latents_std),
            **({} if self.patch == 1 else {"patch": self.patch}),
            **({} if self.pipelines is None else {"pipelines": self.pipelines}),
            **({} if self.frames == 1 else {"frames": self.frames}),
            **({"sounds": True} if self.sounds else {}),
        }

    def per_channel(self, channels: int) -> Normalisation:
        """The same with a mean and a deviation for each of the latents' channels, and no scaling_factor."""
        scale = 1.0 if self.scaling_factor is None else self.scaling_factor
        mean = self.latents_mean or (self.shift_factor or 0.0,) * channels
        std = tuple(one / scale for one in self.latents_std or (1.0,) * channels)
        return replace(self, scaling_factor=None, shift_factor=None, latents_mean=mean, latents_std=std)

    def laid_out_for(self, pipelines: str | None) -> Normalisation:
        """Make the same, measured on channels (c, row, column), for the layout of a family of pipelines."""
        found = replace(self, pipelines=pipelines)
        if self.latents_mean is None or self.latents_std is None or found.layout != "position":
            return found
        mean, std = (
            positions_first(torch.tensor(values, dtype=torch.float64)[:, None, None], self.patch)
            for values in (self.latents_mean, self.latents_std)
        )
        return replace(found, latents_mean=tuple(mean.flatten().tolist()), latents_std=tuple(std.flatten().tolist()))

    @property
    def layout(self) -> Layout:
        """Layout of the channels of patches."""
        return "channel" if self.pipelines is None else VARIANTS[self.pipelines].layout

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of a z of this shape (c, h, w), (c, t, h, w) or (c, n)."""
        if self.layout == "none" or self.sounds:
            return stored
        channels, *frames, height, width = stored
        return (channels * self.patch**2, *frames, height // self.patch, width // self.patch)

    # in the order of operations of diffusers' pipelines: equal to the bit

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z [c, h, w], [B, c, h, w] or [B, c, t, h, w], of sounds [c, n] or [B, c, n] => latents, of the same shape
        unless they are patchified.

        Raises:
            UsageError: it has not the channels that the means are of.
        """
        if z.ndim == 5 and self.patch > 1:  # a class of images, frame by frame
            return clips_of(self.apply(frames_of(z)), z.shape[2])
        if self.sounds:
            return self._done(z)
        z = torch.pixel_unshuffle(z, self.patch)
        latents = self._done(positions_first(z, self.patch) if self.layout == "position" else z)
        return torch.pixel_shuffle(latents, self.patch) if self.layout == "none" else latents

    def _done(self, z: torch.Tensor) -> torch.Tensor:
        if self.latents_mean is None or self.latents_std is None:
            return (z - (self.shift_factor or 0.0)) * self.scaling_factor  # type: ignore[operator]
        mean, std = self._channels(self.latents_mean, z), self._channels(self.latents_std, z)
        if self.scaling_factor is None:
            return (z - mean) * (1.0 / std)
        return (z - mean) * self.scaling_factor / std

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [c, h, w], [B, c, h, w] or [B, c, t, h, w], of sounds [c, n] or [B, c, n] => z."""
        if latents.ndim == 5 and self.patch > 1:
            return clips_of(self.undo(frames_of(latents)), latents.shape[2])
        if self.sounds:
            return self._undone(latents)
        if self.layout == "none":
            latents = torch.pixel_unshuffle(latents, self.patch)
        z = self._undone(latents)
        return torch.pixel_shuffle(channels_first(z, self.patch) if self.layout == "position" else z, self.patch)

    def _undone(self, latents: torch.Tensor) -> torch.Tensor:
        if self.latents_mean is None or self.latents_std is None:
            return latents / self.scaling_factor + (self.shift_factor or 0.0)  # type: ignore[operator]
        mean, std = self._channels(self.latents_mean, latents), self._channels(self.latents_std, latents)
        if self.scaling_factor is None:
            return latents / (1.0 / std) + mean
        return latents * std / self.scaling_factor + mean

    def _channels(self, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """One value for each channel, or for each channel and latent frame: an image has the first frame's."""
        found = torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, self.frames, 1, 1)
        if self.sounds:
            if like.ndim not in (2, 3) or like.shape[-2] != len(found):
                raise UsageError(
                    f"normalisation: is of sounds with {len(found)} channels, got latents {list(like.shape)}; expected "
                    "[c, n] or [B, c, n]"
                )
            return found[:, 0, 0]
        # a clip [c, t, h, w] alone would be taken for a batch of images
        if like.ndim < 3 or like.shape[0 if like.ndim == 3 else 1] != len(found):
            raise UsageError(
                f"normalisation: is of {len(found)} channels, got latents {list(like.shape)}; expected [c, h, w], "
                "[B, c, h, w] or [B, c, t, h, w]: a clip alone is a batch of one, z[None]"
            )
        if like.ndim < 5:
            return found[:, 0]
        if 1 < self.frames < like.shape[2]:
            raise UsageError(
                f"normalisation: is for clips of {self.frames} latent frames, got {like.shape[2]}; measure `channel`"
            )
        return found[:, : like.shape[2]]
