"""Evidence lower bound on held-out images, by the averaged weights of the autoencoder and the likelihood's own
variance.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.data.transforms import to_pixels
from ldm_vae.metrics.batches import ImageBatch
from ldm_vae.metrics.ranks import gather

if TYPE_CHECKING:
    from ldm_vae.training.objective import Objective


@torch.inference_mode()
def evidence_bound(
    vae: Any, objective: Objective, batches: Iterable[ImageBatch], device: torch.device
) -> dict[str, float]:
    """elbo_nats_per_image and elbo_bits_per_dimension, means over the images of all ranks, each with one sample of its
    posterior, keyed by its index; empty where the objective has no likelihood or the latent no rate.

    Args:
        vae: a diffusers autoencoder on `device`, in eval mode.
        batches: the images of this rank, each image on exactly one rank.
    """
    likelihood = objective.likelihood
    if likelihood is None or not isinstance(vae, AutoencoderKL):
        return {}
    sums = torch.zeros(3, dtype=torch.float64)  # nats, bits, images
    for batch in batches:
        pixels = to_pixels(batch.pixels.to(device))
        moments = finite.encode(vae, pixels)
        noise = latents.posterior_noise(0, batch.indices, moments.mean.shape[1:]).to(device)
        decoded = finite.decode(vae, moments.sample(noise))
        nats = moments.kl().sum() / len(pixels)
        term = objective.terms[likelihood](frames_of(decoded), frames_of(pixels))
        logs = {f"loss/{likelihood}": term, "kl_nats_per_image": nats}
        bound = objective.bound(logs, pixels)
        means = [bound["elbo/nats_per_image"], bound["elbo/bits_per_dimension"], pixels.new_ones(())]
        sums += len(pixels) * torch.stack(means).double().cpu()
    nats_sum, bits_sum, images = gather(sums).sum(dim=0).tolist()
    return {"elbo_nats_per_image": nats_sum / images, "elbo_bits_per_dimension": bits_sum / images}
