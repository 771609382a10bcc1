"""Smallest crop of a run: what looks at the images must have room for it, and what looks at clips must have some, known
before the first step.

Legend: T frames of a clip, H W pixels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.core.errors import UsageError
from ldm_vae.core.rng import seeded
from ldm_vae.core.validation import first_line
from ldm_vae.data.buckets import Shape
from ldm_vae.training.config import Training, build_discriminator, build_objective


def crop_size(settings: Training) -> tuple[int, ...]:
    """(H, W) of a square crop, of clips (T, H, W), of excerpts of sounds (L,)."""
    if settings.samples is not None:
        return (settings.samples,)
    frames = getattr(settings.data, "frames", None)
    return (*([] if frames is None else [frames]), settings.resolution, settings.resolution)


def sides(settings: Training, factor: int) -> tuple[int, int]:
    """(height, width) in pixels of the smallest images that a step may see, by the shortest side.

    factor: f of the autoencoder; a latent that `perturbations.eq` scales is decoded to whole multiples of it.
    """
    shapes = [shape[-2:] for shape in _shapes(settings, factor)]
    scale = min((min(getattr(part, "scales", (1.0,))) for part in settings.perturbations.values()), default=1.0)
    height, width = min(shapes, key=min)
    return factor * max(1, round(scale * height / factor)), factor * max(1, round(scale * width / factor))


def shortest(settings: Training, factor: int) -> int:
    """T of the shortest clip that a step may see: images among the videos are clips of one frame, unless
    `buckets.shapes` leaves them out."""
    return min(shape[0] if len(shape) == 3 else 1 for shape in _shapes(settings, factor))


def _shapes(settings: Training, factor: int) -> list[Shape]:
    square = (settings.resolution, settings.resolution)
    return [square] if settings.buckets is None else settings.buckets.choose(settings.resolution, factor)


def check_smallest(settings: Training, vae: Any) -> None:
    """Show terms of pixels and a discriminator like those of the run two images of the smallest crop, those of clips
    two of the shortest clips, those of sounds two excerpts.

    Raises:
        UsageError: one of them fails there, as where it has no room; the sentence names it and the crop. Or it is for
            clips, and the run has none.
    """
    factor = downsampling_factor(vae)
    height, width = sides(settings, factor)
    sounds = settings.samples is not None
    # of its own: batch statistics move, and some terms keep sums until the update
    objective, critic = build_objective(settings, outline=True), build_discriminator(settings, outline=True)
    looking: dict[str, tuple[Any, int]] = {
        f"losses.{name}": (term, 2)
        for name, term in objective.terms.items()
        if (getattr(term, "of_sounds", term.domain == "sounds") if sounds else term.domain in ("pixels", "clips"))
    }
    for term, _ in looking.values() if sounds else ():
        if hasattr(term, "attach"):  # it asks the network for its rate
            term.attach(SimpleNamespace(vae=vae))
    if critic is not None:
        looking["discriminator"] = (critic, 1)
    of_clips = [name for name, (module, _) in looking.items() if getattr(module, "domain", "pixels") == "clips"]
    of_clips += [f"losses.{name}.frames" for name, one in objective.configs.items() if one.frames is not None]
    if critic is not None and sounds != (getattr(critic, "domain", "pixels") == "sounds"):
        kind, what = ("images", "sounds") if sounds else ("sounds", "none")
        raise UsageError(f"discriminator: {type(critic).__name__} is of {kind}, and this run has {what}")
    if of_clips and crop_size(settings)[:-2] in ((), (1,)):
        raise UsageError(f"{of_clips[0]}: is for clips, and this run has images alone; expected data.frames above 1")
    images = torch.zeros(2, settings.seen_channels, *(crop_size(settings) if sounds else (height, width)))
    frames = shortest(settings, factor)
    clips = images if sounds else images[:, :, None].expand(-1, -1, frames, -1, -1)
    for name, (module, arguments) in looking.items():
        try:
            with torch.no_grad(), seeded(settings.seed):
                module(*[clips if name in of_clips else images] * arguments)
        except (RuntimeError, ValueError) as error:
            made_by = " and ".join(
                ["resolution", *(one for one in ("buckets", "perturbations") if getattr(settings, one))]
            )
            crop = f"the smallest crop, {height} x {width} px by {made_by}"
            if sounds:
                crop = f"an excerpt, {settings.samples} samples by data.samples"
            if name in of_clips:
                crop = f"the shortest clip, {frames} x {height} x {width} px by data.frames, {made_by}"
            if isinstance(error, UsageError):
                raise UsageError(f"{error} ({crop})") from error
            fewer = "fewer layers or " if name == "discriminator" else ""
            raise UsageError(
                f"{name}: fails on {crop}: {first_line(error)[:160]}; where it has no room there, {fewer}larger crops "
                f"would do"
            ) from error
