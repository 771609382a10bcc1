"""Config of a diffusion run: its knobs, the store it reads, its network. The loop is train/diffusion.py.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field

from ldm_vae.autoencoder.normalisation import NormalisationKind
from ldm_vae.core import rng
from ldm_vae.core.config import choice
from ldm_vae.core.errors import UsageError
from ldm_vae.denoisers.dit import Config as DiTConfig
from ldm_vae.diffusion.flow import Denoiser, FlowConfig, SamplingConfig
from ldm_vae.latent_store.format.manifest import place_of, read_manifest
from ldm_vae.run import cost
from ldm_vae.run.store_training import MAY_CHANGE as STORE_MAY_CHANGE
from ldm_vae.run.store_training import StoredSamples, StoreTraining, open_samples


class DiffusionTraining(StoreTraining):
    """All knobs of a run."""

    normalisation: NormalisationKind | None = None
    """Of the latents, from the store's statistics; default: the one that the VAE's config.json named."""
    flow: FlowConfig = FlowConfig()
    denoiser: choice("ldm_vae.denoisers", default="dit") = DiTConfig()  # type: ignore[valid-type]
    """The network."""
    sampling: SamplingConfig = SamplingConfig()
    """Of the pictures and of what is measured; other samplers can be chosen later."""
    measure_images: int = Field(256, ge=0)
    """Samples that are compared with as many decoded latents at the end; 0: none."""
    clip: str | None = None
    """A CLIP as transformers has it, a folder or its hub id: that comparison is made by CMMD too."""


MAY_CHANGE = (*STORE_MAY_CHANGE, "sampling.method", "sampling.steps", "sampling.guidance", "measure_images", "clip")


def open_latents(settings: DiffusionTraining) -> StoredSamples:
    """The store of the config. Raises what `open_samples` does, and UsageError for indices, clips and sounds."""
    if read_manifest(place_of(settings.latents)).identity.codes is not None:
        raise UsageError(
            f"latents {settings.latents}: holds indices of codes; a diffusion model needs vectors, which "
            "`ldm-vae encode --store mean` keeps"
        )
    latents = open_samples(settings, normalisation=settings.normalisation)
    if len(latents.shape) != 3:
        what = "sounds" if len(latents.shape) == 2 else "clips"
        raise UsageError(
            f"latents {settings.latents}: holds latents of {what}, {' x '.join(map(str, latents.shape))}; the networks "
            "here are of images"
        )
    return latents


# --- the network ------------------------------------------------------------------------------------------------------


def build_denoiser(settings: DiffusionTraining, latents: StoredSamples) -> Denoiser:
    """Build the network with random weights, drawn by the seed."""
    channels, *size = latents.shape
    with rng.seeded(settings.seed):
        network = settings.denoiser.build(channels, tuple(size), len(latents.classes))
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return Denoiser(network.train(), len(latents.classes))


def count_step(
    build: Callable[[], Denoiser], shape: Sequence[int], batch: int, mixed_precision: str = "no"
) -> cost.StepCost:
    """Cost of a training step of a network on latents of this shape [c, h, w]."""

    def loss(denoiser: Denoiser) -> torch.Tensor:
        latents, labels = torch.empty(batch, *shape), torch.zeros(batch, dtype=torch.long)
        velocity: torch.Tensor = denoiser(latents, torch.rand(batch), labels)
        return (velocity - latents).square().mean()

    return cost.count_step(build, loss, batch, mixed_precision)


def describe(settings: DiffusionTraining, processes: int = 1) -> str:
    """Text that `--dry_run` prints: the resolved config as YAML, then the cost as comments.

    Raises:
        UsageError: the config does not hold together, or the store is not there.
    """
    latents = open_latents(settings)
    counted = count_step(
        lambda: build_denoiser(settings, latents), latents.shape, settings.train_batch_size, settings.mixed_precision
    )
    return cost.plan(settings, latents, counted, processes)
