"""The normalisation of what a run has trained: a base's, or measured on its latents. At the end of the run, and for a
checkpoint when a command needs it.

Legend: B batch, C image channels, R side of a crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.fine_tuning import encoder_learns, set_trainable
from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import give, held_by, is_fixed, kind_of
from ldm_vae.autoencoder.preparation import recorded
from ldm_vae.autoencoder.weights.checkpoint import is_checkpoint
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.holdout import part_of
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.data.source import with_resize
from ldm_vae.data.transforms import to_values
from ldm_vae.export.measurement import base_normalisation, measure, statistics_of_store
from ldm_vae.export.normalisation import is_default
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.metrics.batches import image_batches, some_of
from ldm_vae.training.config import Training


def given_normalisation(settings: Training, vae: Any) -> Normalisation | None:
    """The normalisation that diffusion models know: of `normalisation_from`, else of the base whose encoder stays as it
    is. None: it is measured. Raises UsageError as `normalisation_of`.

    vae: whose parameters that learn have gradients.
    """
    channels = latent_channels(vae)
    if settings.normalisation_from is not None:
        return base_normalisation(settings.normalisation_from, channels)
    by_name, resized = settings.normalisation is not None, settings.ignore_mismatched_sizes
    if settings.init_from is None or by_name or resized or encoder_learns(vae):
        return None
    try:
        base = base_normalisation(settings.init_from, channels)
    except UsageError:  # its config names none that holds
        return None
    if is_default(base, vae):
        return None
    if settings.model.kind == "inflated":  # another class: said now and not when the run has ended
        try:
            held_by(vae, base)
        except UsageError as error:
            raise UsageError(f"init_from {settings.init_from}: {error}; `normalisation: scale` measures one") from error
    return base


def normalise(
    settings: Training, vae: Any, given: Normalisation | None, statistics: LatentStatistics | None = None
) -> tuple[Normalisation | None, LatentStatistics]:
    """The normalisation that goes with trained weights, None where their class names none; and the statistics of their
    latents: those of the caller, else of the run's latent store, or measured on some of its training images."""
    if statistics is None and settings.latent_store is not None:
        statistics = statistics_of_store(vae, settings.latent_store)
    statistics = statistics or measure(vae, _images(settings, recorded(vae)), vae.device)
    if is_fixed(vae):
        return Normalisation(1.0), statistics
    if (usual := kind_of(vae)) is None:  # the class has no place for one
        return None, statistics
    return given or statistics.normalisation(settings.normalisation or usual), statistics


def measure_checkpoint(
    vae: Any, source: str | Path, statistics: LatentStatistics | None = None
) -> LatentStatistics | None:
    """Write the normalisation into the config of a network that was loaded from a checkpoint, which has none: what the
    end of its run would write. What was loaded from elsewhere has its own and stays as it is (None).

    statistics: of its latents, where they have been measured; else the run's images are.

    Raises:
        UsageError: the run's images are not there any more, or its config cannot be read; the sentence says what would
            do.
    """
    if not is_checkpoint(source):
        return None
    try:
        settings = config.load(Training, Path(source) / "config.yaml")
        set_trainable(vae, settings.trainable)
        given = given_normalisation(settings, vae)
        normalisation, statistics = normalise(settings, vae.requires_grad_(False), given, statistics)
    except (UsageError, WorkError) as error:
        raise UsageError(
            f"VAE {source}: the scaling of a checkpoint is measured on its run's images ({error}); `ldm-vae export "
            f"{source} OUT --stats DATA` measures it on others"
        ) from error
    if normalisation is not None:
        give(vae, normalisation)
    return statistics


def _images(settings: Training, record: Preprocessing | None) -> Iterator[torch.Tensor]:
    """Training images [B, C, R, R] in [-1, 1], decoded exactly, as encoding will, whatever jpeg_draft says; of images
    that were split those that the network's record does not hold out."""
    # a draft's pixels differ, and the statistics would be those of other latents than encoding gives
    source = settings.data.model_copy(update={"jpeg_draft": False} if settings.data.jpeg_draft else {}).build()
    source = with_resize(source, settings.transform.resize)
    if record is not None and record.holdout is not None:
        source, _ = part_of(source, record.holdout, "train", settings.data.path)
    chosen = some_of(source, settings.normalisation_images)
    batches = image_batches(source, chosen, settings.resolution, batch_size=settings.train_batch_size)
    # counted here too: of a stream `some_of` cannot choose
    left = settings.normalisation_images
    for batch in batches:
        yield to_values(batch.pixels)
        left -= settings.train_batch_size
        if left <= 0:
            return
