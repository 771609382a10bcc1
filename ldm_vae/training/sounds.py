"""Sounds in a training config: what they need, and what is of images and clips."""

from __future__ import annotations

from typing import Any

from ldm_vae.autoencoder.lengths import check_samples
from ldm_vae.autoencoder.preparation import check_signal_of
from ldm_vae.data.source import SourceConfig
from ldm_vae.data.transforms import TransformConfig

IMAGE_PERTURBATIONS = ("eq", "teacher_latents")


def check_sounds(settings: Any) -> None:
    """Raise ValueError for a config of sounds that names what is of images, or lacks what sounds need; `settings`: of
    `config.Training`."""
    rate, own = getattr(settings.data, "sample_rate", None), getattr(settings.model, "sampling_rate", None)
    if own is not None and rate != own:
        raise ValueError(f"data.sample_rate: expected model.sampling_rate {own}, got {rate or 'none'}")
    if rate is None:
        return
    if settings.samples is None:
        raise ValueError("data.samples: is missing, the samples of an excerpt of data.sample_rate")
    if settings.validation_data is not None and getattr(settings.validation_data, "samples", None) is None:
        raise ValueError("validation_data.samples: is missing, the samples of an excerpt that is validated on")
    if settings.resolution != type(settings).model_fields["resolution"].default:
        raise ValueError("resolution: is of images, and excerpts of sounds have data.samples; leave it out")
    names = {
        "buckets": settings.buckets, "transform": settings.transform != TransformConfig(),
        **{f"perturbations.{name}": part.kind in IMAGE_PERTURBATIONS for name, part in settings.perturbations.items()},
    }  # fmt: skip
    if refused := [name for name, value in names.items() if value]:
        raise ValueError(f"{refused[0]}: is of images and clips, and data.sample_rate reads sounds; leave it out")


def check_data(settings: Any, vae: Any, name: str) -> None:
    """Raises UsageError for sounds as data of a network of images, and the other way round."""
    if isinstance(settings.data, SourceConfig):
        check_signal_of(vae, settings.data.decoding(), name, "data.sample_rate")
        if settings.samples is not None:
            check_samples(vae, settings.samples, "data.samples")
