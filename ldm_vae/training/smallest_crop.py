"""Smallest crop of a run: what looks at the images must have room for it, known before the first step."""

from __future__ import annotations

import torch

from ldm_vae.core.errors import UsageError
from ldm_vae.core.rng import seeded
from ldm_vae.core.validation import first_line
from ldm_vae.training.config import Training, build_discriminator, build_objective


def sides(settings: Training, factor: int) -> tuple[int, int]:
    """(height, width) in pixels of the smallest images that a step may see, by the shortest side.

    factor: f of the autoencoder; a latent that `perturbations.eq` scales is decoded to whole multiples of it.
    """
    square = (settings.resolution, settings.resolution)
    shapes = [square] if settings.buckets is None else settings.buckets.choose(settings.resolution, factor)
    scale = min((min(getattr(part, "scales", (1.0,))) for part in settings.perturbations.values()), default=1.0)
    height, width = min(shapes, key=min)
    return factor * max(1, round(scale * height / factor)), factor * max(1, round(scale * width / factor))


def check_smallest(settings: Training, factor: int) -> None:
    """Show terms of pixels and a discriminator like those of the run two images of the smallest crop.

    Raises:
        UsageError: one of them fails there, as where it has no room; the sentence names it and the crop.
    """
    height, width = sides(settings, factor)
    # of its own: batch statistics move, and some terms keep sums until the update
    objective, critic = build_objective(settings, outline=True), build_discriminator(settings, outline=True)
    looking = {f"losses.{name}": (term, 2) for name, term in objective.terms.items() if term.domain == "pixels"}
    if critic is not None:
        looking["discriminator"] = (critic, 1)
    images = torch.zeros(2, settings.seen_channels, height, width)
    for name, (module, arguments) in looking.items():
        try:
            with torch.no_grad(), seeded(settings.seed):
                module(*[images] * arguments)
        except (RuntimeError, ValueError) as error:
            made_by = " and ".join(
                ["resolution", *(one for one in ("buckets", "perturbations") if getattr(settings, one))]
            )
            crop = f"the smallest crop, {height} x {width} px by {made_by}"
            if isinstance(error, UsageError):
                raise UsageError(f"{error} ({crop})") from error
            fewer = "fewer layers or " if name == "discriminator" else ""
            raise UsageError(
                f"{name}: fails on {crop}: {first_line(error)[:160]}; where it has no room there, {fewer}larger crops "
                f"would do"
            ) from error
