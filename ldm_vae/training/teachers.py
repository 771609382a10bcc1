"""Teachers of a run: networks that a term or a perturbation asks what it makes of the training's images."""

from __future__ import annotations

from typing import Any

from ldm_vae.autoencoder.geometry import check_resolution, downsampling_factor, image_channels, latent_channels
from ldm_vae.core.errors import UsageError
from ldm_vae.perceptual.teacher import teacher
from ldm_vae.training.config import Training, check_preprocessing


def check_teachers(settings: Training, vae: Any) -> None:
    """Raises UsageError where a teacher, which sees the training's images, records another preprocessing, or has
    latents of another shape than those of `vae`."""
    ours = (latent_channels(vae), downsampling_factor(vae))
    for section in ("losses", "perturbations"):
        for name, part in getattr(settings, section).items():
            if isinstance(source := getattr(part, "teacher", None), str):
                network, place = teacher(source).network, f"{section}.{name}.teacher {source}"
                check_preprocessing(settings, network, place)
                check_resolution(settings.resolution, network)
                if (images := image_channels(network)) != settings.model.in_channels:
                    raise UsageError(f"{place}: expected images of {settings.model.in_channels} channels, has {images}")
                theirs = (latent_channels(network), downsampling_factor(network))
                if theirs != ours:
                    raise UsageError(
                        f"{place}: has latents of {theirs[0]} channels at f {theirs[1]}, the model of {ours[0]} at f "
                        f"{ours[1]}; expected the same{_tiny_of(settings, *theirs)}"
                    )


def _tiny_of(settings: Training, channels: int, factor: int) -> str:
    """The shape of an AutoencoderTiny for latents of so many channels at this f."""
    if settings.model.kind != "tiny":
        return ""
    if factor & (factor - 1):
        return f", and no AutoencoderTiny has f {factor}: theirs are powers of 2"
    return f": model.latent_channels {channels} and {factor.bit_length()} widths on each side"
