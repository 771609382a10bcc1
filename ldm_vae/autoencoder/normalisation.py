"""Normalisation of latents: from z to what a diffusion model sees, and back.

Legend: c latent channels, h w latent positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ldm_vae.autoencoder.latents import LOGVAR_RANGE
from ldm_vae.core.errors import UsageError, WorkError

LEAST_VARIANCE = 2 * math.exp(LOGVAR_RANGE[0])  # of a posterior at the end of that range, and rounding: nothing

NormalisationKind = Literal["scale", "shift", "channel"]


@dataclass(frozen=True)
class Normalisation:
    """The one way from z to latents that a VAE's config.json names, and back.

    - scale:   z * scaling_factor (Stable Diffusion, SDXL);
    - shift:   (z - shift_factor) * scaling_factor (SD3, FLUX);
    - channel: (z - latents_mean) * scaling_factor / latents_std, the inverse of SDXL's
      z * latents_std / scaling_factor + latents_mean.

    >>> import torch
    >>> from ldm_vae import Normalisation
    >>> sd = Normalisation(scaling_factor=0.18215)
    >>> sd.kind, sd.undo(sd.apply(torch.ones(1, 4, 8, 8))).mean().item()
    ('scale', 1.0)
    """

    scaling_factor: float
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ValueError("shift_factor and latents_mean are both set: latents would be shifted twice")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std are set together or not at all")
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
                scaling_factor=1.0 if scale is None else float(scale),
                shift_factor=None if shift is None else float(shift),
                latents_mean=None if mean is None else tuple(map(float, mean)),
                latents_std=None if std is None else tuple(map(float, std)),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{where}: {error}; `ldm-vae export SRC OUT --stats DATA` measures it") from error

    @classmethod
    def from_statistics(cls, kind: NormalisationKind, mean: torch.Tensor, variance: torch.Tensor) -> Normalisation:
        """Make from measured per-channel mean [c] and variance [c] (fp64) of the sampled latents.

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
            return cls(1.0, None, tuple(mean.tolist()), tuple(variance.sqrt().tolist()))
        return cls(1.0 / math.sqrt(scalar_variance), scalar_mean if kind == "shift" else None)

    def to_config(self) -> dict[str, Any]:
        """All four keys, the unused ones null, so that writing one normalisation erases any other."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": None if self.latents_mean is None else list(self.latents_mean),
            "latents_std": None if self.latents_std is None else list(self.latents_std),
        }

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z => latents, both [..., c, h, w]."""
        shift, scale = self._affine(z)
        return (z - shift) * scale

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """latents => z, both [..., c, h, w]."""
        shift, scale = self._affine(latents)
        return latents / scale + shift

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor or 0.0, self.scaling_factor
        shift = torch.tensor(self.latents_mean, device=like.device, dtype=like.dtype).view(-1, 1, 1)
        std = torch.tensor(self.latents_std, device=like.device, dtype=like.dtype).view(-1, 1, 1)
        return shift, self.scaling_factor / std
