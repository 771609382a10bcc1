"""The evidence lower bound on held-out images: torch's densities, whatever the batches, and only where there is one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_networks import TinyLPIPS, network
from torch.distributions import Normal, kl_divergence

from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.perceptual.lpips import LPIPS
from ldm_vae.run.ema import Ema
from ldm_vae.training.objective import Objective

CPU = torch.device("cpu")


def test_it_is_the_density_of_torchs_normals(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    source = open_source(image_folder)
    objective = Objective({"gaussian_nll": GaussianNLL(logvar=-1.0), "kl": KL()})
    found = [
        evidence_bound(tiny_vae, objective, image_batches(source, None, 32, batch_size=size), CPU) for size in (5, 12)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # 5 + 5 + 2 images
    (batch,) = image_batches(source, None, 32, batch_size=12)
    with torch.no_grad():
        images = to_pixels(batch.pixels)
        q = tiny_vae.encode(images).latent_dist
        z = q.mean + q.std * posterior_noise(0, range(12), (4, 16, 16))
        density = Normal(tiny_vae.decode(z).sample, math.exp(-0.5)).log_prob(images) + math.log(2 / 255)
        rate = kl_divergence(Normal(q.mean, q.std), Normal(0.0, 1.0))
    nats = (density.sum() - rate.sum()).item() / 12
    assert found[0]["elbo_nats_per_image"] == pytest.approx(nats, rel=1e-5)
    assert found[0]["elbo_bits_per_dimension"] == pytest.approx(-nats / 3072 / math.log(2), rel=1e-5)


def test_there_is_none_without_a_likelihood_or_a_rate(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    batches = list(image_batches(open_source(image_folder), None, 32, batch_size=4))
    assert evidence_bound(tiny_vae, Objective({"l1": L1(), "kl": KL()}), batches, CPU) == {}
    assert evidence_bound(network(codes=True).vae, Objective({"gaussian_nll": GaussianNLL()}), batches, CPU) == {}


def test_the_terms_own_parameters_are_averaged_and_what_they_look_through_is_shared() -> None:
    objective = Objective({"gaussian_nll": GaussianNLL(logvar=0.0), "kl": KL()})
    objective.terms["lpips"] = LPIPS(TinyLPIPS(), 16)
    averaged = Ema(objective, halflife_images=100)
    assert averaged.module.terms["lpips"].network is objective.terms["lpips"].network
    with torch.no_grad():
        objective.terms["gaussian_nll"].logvar.fill_(1.0)
    averaged.update(objective, images_seen=10_000, batch_images=100)
    assert averaged.module.terms["gaussian_nll"].logvar.item() == pytest.approx(0.5)
    assert list(averaged.state_dict()) == ["terms.gaussian_nll.logvar"]
