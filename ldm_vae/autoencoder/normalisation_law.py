"""Normalisation laws: where a network names the normalisation of its latents, and how it is given another."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderTiny

from ldm_vae.autoencoder.families import VARIANTS, Law, Variant, family_of, is_movq
from ldm_vae.autoencoder.normalisation import Normalisation, NormalisationKind
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an

UNMEASURED = 0.0  # what nobody can divide by: of weights whose latents were never measured


def law_of(vae: Any) -> Law:
    """The place of a network's normalisation, as its family has it."""
    return "inside" if is_movq(vae) else family_of(vae).law


def kind_of(vae: Any) -> NormalisationKind | None:
    """The kind of normalisation that a network names, with whatever numbers; None where it names none."""
    law, config = law_of(vae), _config(vae)
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
            f"{an(type(vae).__name__)}; leave it out for all others, which read it as its class has it"
        )
    if law == "inside":
        return Normalisation(1.0, sounds=family_of(vae).signal == "audio")
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
    found = replace(Normalisation.from_config(_config(vae), where), sounds=family_of(vae).signal == "audio")
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
            f"{where}: {an(type(vae).__name__)} whose config names no normalisation of its latents; measure one: "
            f"{export}`normalisation` of a latent store's readers"
        )
    return found


def has_place(vae: Any) -> bool:
    """True where a network can keep a normalisation."""
    return law_of(vae) != "config" or not {"scaling_factor", "latents_std"}.isdisjoint(_keys(vae))


def held_by(vae: Any, normalisation: Normalisation) -> Normalisation:
    """The same normalisation as a network's class can hold it. Raises UsageError where it cannot."""
    law, name, keys = law_of(vae), type(vae).__name__, _keys(vae)
    if law == "inside" and replace(normalisation, sounds=False) != Normalisation(1.0):
        raise UsageError(
            f"normalisation `{normalisation.kind}`: {an(name)} normalises inside, so that its z stays as it is"
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
        has_no = "pipelines of {} read no" if missing[0] in family_of(vae).unread else "the config of {} has no"
        raise UsageError(f"normalisation `{normalisation.kind}`: {has_no.format(an(name))} {missing[0]}")
    return normalisation


def _config(vae: Any) -> dict[str, Any]:
    """A network's config as its pipelines read it."""
    return {name: value for name, value in vae.config.items() if name not in family_of(vae).unread}


def _keys(vae: Any) -> dict[str, Any]:
    """The keys of a class's config that its pipelines read, with its defaults."""
    keys = inspect.signature(type(vae).__init__).parameters
    return {name: one.default for name, one in keys.items() if name not in family_of(vae).unread}


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
