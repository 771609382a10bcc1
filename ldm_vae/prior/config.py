"""Config of a prior over codes: its knobs, the index stores that it reads, its network. The loop is train/prior.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from ldm_vae.core import rng
from ldm_vae.core.config import choice
from ldm_vae.core.errors import UsageError
from ldm_vae.latent_store.format.manifest import place_of, read_manifest
from ldm_vae.prior.model import Prior
from ldm_vae.prior.sampling import SamplingConfig
from ldm_vae.run import cost
from ldm_vae.run.store_training import MAY_CHANGE as STORE_MAY_CHANGE
from ldm_vae.run.store_training import StoredSamples, StoreTraining, open_samples


class PriorTraining(StoreTraining):
    """All knobs of a run."""

    validation_latents: str | None = None
    """A store of held-out images, by the same VAE: what bits are measured on; default: the training store."""
    validate_every_images: int | None = Field(None, gt=0)
    """Bits of the averaged weights, into metrics.jsonl; they are measured at the end in any case."""
    validation_images: int = Field(256, gt=0, le=2**24)
    """Images, or crops of them, evenly spread over the store."""
    model: choice("ldm_vae.priors", default="transformer") = Field({"kind": "transformer"})  # type: ignore[valid-type]
    """The network."""
    sampling: SamplingConfig = SamplingConfig()
    """Of the pictures; others can be chosen later."""


MAY_CHANGE = (*STORE_MAY_CHANGE, "validation_latents", "validate_every_images", "validation_images",
              *(f"sampling.{name}" for name in SamplingConfig.model_fields))  # fmt: skip


def open_codes(settings: PriorTraining) -> tuple[StoredSamples, StoredSamples]:
    """The stores of the config: to train on, and to measure on.

    Raises:
        UsageError: what `open_samples` does; a store of latents, or two that do not go together.
    """
    train = open_samples(settings)
    identity = train.dataset.manifest.identity
    if identity.codes is None:
        raise UsageError(
            f"latents {settings.latents}: holds {identity.store}; a prior needs indices of codes, which `ldm-vae "
            "encode` keeps of a VQModel"
        )
    if settings.validation_latents is None:
        return train, train
    place, name = place_of(settings.validation_latents), f"validation_latents {settings.validation_latents}"
    theirs = read_manifest(place)
    if (theirs.identity.encoder, theirs.identity.codes) != (identity.encoder, identity.codes):
        raise UsageError(f"{name}: expected codes of the VAE that made {settings.latents}, these are of another")
    column = train.label_column if train.label_column in theirs.columns else None
    fixed = {"latents": settings.validation_latents, "label_column": column, "conditional": column is not None}
    held_out = open_samples(settings.model_copy(update=fixed | {"view": ""}))
    if held_out.shape != train.shape:
        shapes = [" x ".join(map(str, found.shape)) for found in (train, held_out)]
        raise UsageError(f"{name}: expected codes {shapes[0]} as in {settings.latents}, got {shapes[1]}")
    if (named := _other_name(train, held_out)) is not None:
        raise UsageError(f"{name}: {named}; expected the same classes, or conditional: false")
    return train, replace(held_out, classes=train.classes, names=train.names)


def _other_name(train: StoredSamples, held_out: StoredSamples) -> str | None:
    """The first label that stands for another folder in the held-out store: numbers of folders are each store's own."""
    if held_out.label_column != "label":
        return None
    theirs, ours = (dict(zip(found.classes, found.names, strict=True)) for found in (held_out, train))
    differ = [label for label in theirs if label in ours and theirs[label] != ours[label]]
    return f"its label {differ[0]} is {theirs[differ[0]]}, that of training is {ours[differ[0]]}" if differ else None


def codes_of(samples: StoredSamples) -> int:
    """Codes in the codebook of an index store."""
    codes = samples.dataset.manifest.identity.codes
    assert codes is not None
    return codes


def build_prior(settings: PriorTraining, samples: StoredSamples) -> Prior:
    """Build the network with random weights, drawn by the seed."""
    with rng.seeded(settings.seed):
        prior: Prior = settings.model.build(codes_of(samples), samples.shape, len(samples.classes))
    if settings.gradient_checkpointing:
        prior.network.enable_gradient_checkpointing()
    return prior.train()


def describe(settings: PriorTraining, processes: int = 1) -> str:
    """Text that `--dry_run` prints: the resolved config as YAML, then the cost as comments.

    Raises:
        UsageError: the config does not hold together, or a store is not there.
    """
    samples, _ = open_codes(settings)
    batch = settings.train_batch_size

    def loss(prior: Prior) -> torch.Tensor:
        indices, labels = torch.zeros(batch, *samples.shape, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        found: torch.Tensor = prior(indices, labels, settings.seed, range(batch))
        return found

    counted = cost.count_step(lambda: build_prior(settings, samples), loss, batch, settings.mixed_precision)
    return cost.plan(settings, samples, counted, processes)
