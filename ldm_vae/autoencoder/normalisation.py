"""Normalisation of latents: from z to what a diffusion model sees, and back.

Legend: c latent channels, t h w latent positions, F latent frames with a mean and a deviation of their own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny

from ldm_vae.autoencoder.families import VARIANTS, Law, Layout, Variant, family_of, is_movq
from ldm_vae.autoencoder.latents import LOGVAR_RANGE
from ldm_vae.autoencoder.patches import channels_first, positions_first
from ldm_vae.core.errors import UsageError, WorkError

LEAST_VARIANCE = 2 * math.exp(LOGVAR_RANGE[0])  # of a posterior at the end of that range, and rounding: nothing

UNMEASURED = 0.0  # what nobody can divide by: of weights whose latents were never measured

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
        said += [] if self.latents_mean is None else [f"mean and std of {len(self.latents_mean)} channels"]
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
        """Shape of the latents of a z of this shape (c, h, w)."""
        if self.layout == "none":
            return stored
        channels, *positions = stored
        return (channels * self.patch**2, *(side // self.patch for side in positions))

    # in the order of operations of diffusers' pipelines: equal to the bit

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z [c, h, w], [B, c, h, w] or [B, c, t, h, w] => latents, of the same shape unless they are patchified."""
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
        """latents [c, h, w], [B, c, h, w] or [B, c, t, h, w] => z."""
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
        if like.ndim < 5:
            return found[:, 0]
        if 1 < self.frames < like.shape[2]:
            raise UsageError(
                f"normalisation: is for clips of {self.frames} latent frames, got {like.shape[2]}; measure `channel`"
            )
        return found[:, : like.shape[2]]


# --- of a network -----------------------------------------------------------------------------------------------------


def law_of(vae: Any) -> Law:
    """The place of a network's normalisation, as its family has it."""
    return "inside" if is_movq(vae) else family_of(vae).law


def kind_of(vae: Any) -> NormalisationKind | None:
    """The kind of normalisation that a network names, with whatever numbers; None where it names none."""
    law, config = law_of(vae), vae.config
    if law in ("batch_norm", "buffers") or (law == "config" and config.get("latents_mean") is not None):
        return "channel"
    if law == "inside" or config.get("scaling_factor") is not None:
        return "scale" if law == "inside" or config.get("shift_factor") is None else "shift"
    return None


def own_normalisation(vae: Any, where: str = "VAE", pipelines: str | None = None) -> Normalisation | None:
    """The normalisation that a network names, as its family's pipelines read it; None where it names none.

    Args:
        pipelines: one of the families of pipelines that read it in another way than the others (`families.VARIANTS`).

    Raises:
        UsageError: it names two, or one by which nobody can divide; `where` is what opens the sentence. No such
            pipelines, or not of this class.
    """
    law = law_of(vae)
    if pipelines is not None and (pipelines not in VARIANTS or law != "batch_norm"):
        raise UsageError(
            f"pipelines {pipelines}: expected one of {', '.join(VARIANTS)}, with an AutoencoderKLFlux2, and {where} is "
            f"a {type(vae).__name__}; leave it out for all others, which read it as its class has it"
        )
    if law == "inside":
        return Normalisation(1.0)
    if law == "batch_norm":
        variant = VARIANTS.get(pipelines or "", Variant())
        std = torch.sqrt(vae.bn.running_var + (variant.eps or vae.config.batch_norm_eps))
        mean, scale = tuple(vae.bn.running_mean.tolist()), None if variant.reciprocal else 1.0
        return Normalisation(scale, None, mean, tuple(std.tolist()), family_of(vae).patch, pipelines)
    if law == "buffers":  # their pipelines leave the config's scaling_factor out
        held = {"latents_mean": vae.latents_mean.tolist(), "latents_std": vae.latents_std.tolist()}
        return Normalisation.from_config({"scaling_factor": 1.0, **held}, where)
    if kind_of(vae) is None:
        return None
    found = Normalisation.from_config(vae.config, where)
    if (sigma_data := family_of(vae).sigma_data) is not None:
        of_each = len(found.latents_mean or ()) // int(vae.config.latent_channels) or 1
        return replace(found, scaling_factor=sigma_data, frames=of_each)
    divides = found.scaling_factor is None and not family_of(vae).reciprocal
    return replace(found, scaling_factor=1.0) if divides else found


def law_in_words(vae: Any) -> str:
    """Part of a sentence: where a network's normalisation stands."""
    law, kind = law_of(vae), kind_of(vae)
    words = {"inside": "inside `encode` and `decode`", "buffers": "`channel`, in buffers `latents_mean`, `latents_std`"}
    if law in words:
        return words[law]
    if law == "batch_norm":
        patch = family_of(vae).patch
        return f"per channel of {patch}x{patch} patches, in the buffers of `bn`"
    return "none: measured on a store" if kind is None else f"`{kind}`, in its config"


def normalisation_of(vae: Any, where: str = "VAE", pipelines: str | None = None) -> Normalisation:
    """`own_normalisation`. Raises UsageError where the network names none."""
    if (found := own_normalisation(vae, where, pipelines)) is None:
        export = "`ldm-vae export SRC OUT --stats DATA`, or " if has_place(vae) else ""
        raise UsageError(
            f"{where}: a {type(vae).__name__} whose config names no normalisation of its latents; measure one: "
            f"{export}`normalisation` of a latent store's readers"
        )
    return found


def has_place(vae: Any) -> bool:
    """True where a network can keep a normalisation."""
    return law_of(vae) != "config" or not {"scaling_factor", "latents_std"}.isdisjoint(_keys(vae))


def held_by(vae: Any, normalisation: Normalisation) -> Normalisation:
    """The same normalisation as a network's class can hold it. Raises UsageError where it cannot."""
    law, name, keys = law_of(vae), type(vae).__name__, _keys(vae)
    if law == "inside" and normalisation != Normalisation(1.0):
        raise UsageError(
            f"normalisation `{normalisation.kind}`: a {name} normalises inside, so that its z stays as it is"
        )
    only_channels = "latents_mean" in keys and ("scaling_factor" not in keys or keys["latents_mean"] is not None)
    if law in ("batch_norm", "buffers") or only_channels:  # also where a mean stands in the config by default
        channels = vae.config.get("z_dim") or vae.config.latent_channels
        found = normalisation.per_channel(vae.bn.num_features if law == "batch_norm" else int(channels))
        scale = family_of(vae).sigma_data or 1.0  # the scheduler's, which comes on top
        std = tuple(one * scale for one in found.latents_std or ())
        return replace(found, latents_std=std, scaling_factor=None if family_of(vae).reciprocal else scale)
    missing = [key for key, value in normalisation.to_config().items() if value is not None and key not in keys]
    if law == "config" and missing:  # VQModel and AutoencoderTiny know no latents_mean
        raise UsageError(f"normalisation `{normalisation.kind}`: the config of a {name} has no {missing[0]}")
    return normalisation


def _keys(vae: Any) -> dict[str, Any]:
    """The keys of a class's config, with its defaults."""
    return {name: one.default for name, one in inspect.signature(type(vae).__init__).parameters.items()}


def is_fixed(vae: Any) -> bool:
    """True where z is normalised already: by the network itself, or by the teacher that an AutoencoderTiny is of."""
    return law_of(vae) == "inside" or isinstance(vae, AutoencoderTiny)


def give(vae: Any, normalisation: Normalisation) -> None:
    """Make a network in memory name this normalisation, where its class keeps it. Raises UsageError as `held_by`."""
    held, law, keys = held_by(vae, normalisation), law_of(vae), _keys(vae)
    if law == "config":
        values = held.to_config()
        vae.register_to_config(
            **{name: keys[name] if values[name] is None else values[name] for name in values.keys() & keys.keys()}
        )
    if law == "buffers":
        vae.latents_mean = vae.latents_mean.new_tensor(held.latents_mean)
        vae.latents_std = vae.latents_std.new_tensor(held.latents_std)
    if law == "batch_norm":
        like = vae.bn.running_mean
        vae.bn.running_mean = like.new_tensor(held.latents_mean)
        vae.bn.running_var = like.new_tensor(held.latents_std).square() - vae.config.batch_norm_eps


def take_away(vae: Any) -> None:
    """Make a network whose weights have moved since it was measured name a normalisation that nobody can divide by."""
    if is_fixed(vae) or kind_of(vae) is None:
        return
    if law_of(vae) == "batch_norm":
        vae.bn.running_var = torch.full_like(vae.bn.running_var, -vae.config.batch_norm_eps)
    elif law_of(vae) == "buffers":
        vae.latents_std = torch.full_like(vae.latents_std, UNMEASURED)
    elif "scaling_factor" in vae.config and family_of(vae).sigma_data is None:
        vae.register_to_config(scaling_factor=UNMEASURED)
    else:
        vae.register_to_config(latents_std=[UNMEASURED] * len(vae.config.latents_std))
