"""The bounds of a VAE's likelihood beside the likelihood itself, and beside the entropy of the data.

    entropy of the data  <=  E -log p(x)  <=  IWAE, K samples  <=  -ELBO        over the true distribution

With two latent dimensions log p(x) is integrated on a grid. The likelihood is a probability of images, so the sum of
p(x) over all images of the data is what the model gives to them, and the rest lies outside.

Legend: N images, c latent dimensions, K importance samples.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.core.progress import Progress
from ldm_vae.demo import factors
from ldm_vae.latent_space.enumeration import compare
from ldm_vae.latent_space.likelihood import effective_samples, importance_bounds, log_ratio
from ldm_vae.latent_space.quadrature import log_evidence

from . import plot
from .network import Likelihood, pixels, train

Json = dict[str, Any]

DIMENSIONS = 2
SAMPLES = (1, 4, 16, 64, 256)  # K: each divides the last
DRAWS = 4096  # of the expected coverage, as many as of a prior


@torch.no_grad()
def log_weights(likelihood: Likelihood, moments: Moments, count: int) -> torch.Tensor:
    """log p(x|z) + log p(z) - log q(z|x) of `count` draws from the posterior of each image, fp64 [N, count]."""
    found = []
    for draw in Progress(range(count), desc="importance samples", leave=False):
        noise = posterior_noise(draw, range(len(moments.mean)), moments.mean.shape[1:])
        found.append(likelihood.each(moments.sample(noise).flatten(1)) + log_ratio(moments, noise))
    return torch.stack(found, dim=1)


def run(options: argparse.Namespace) -> Json:
    """Train one network; its bounds and its likelihood of every image."""
    with torch.enable_grad():
        network, sigma = train(DIMENSIONS, 1.0, options.images, options.batch_size, 0)
    images, probabilities = pixels(), factors.probabilities()
    likelihood, moments = Likelihood(network, sigma, images), network.encode(images)
    weights = log_weights(likelihood, moments, max(SAMPLES))
    exact, change = log_evidence(likelihood.everywhere, DIMENSIONS, options.steps)

    def bits(nats: torch.Tensor) -> float:
        return -float((probabilities * nats).sum()) / math.log(2)

    return {
        "images": len(images),
        "entropy_bits": factors.entropy_bits(),
        "exact_bits": bits(exact),
        "bounds_bits": {str(count): bits(nats) for count, nats in importance_bounds(weights, SAMPLES).items()},
        "rate_bits": -bits(moments.kl().double().flatten(1).sum(dim=1)),
        "effective_samples": float((probabilities * effective_samples(weights)).sum()),
        "sigma": sigma,
        # the largest of all images, in bits
        "quadrature_error_bits": float(change.abs().max()) / math.log(2),
        "truth": compare(probabilities, -exact, DRAWS),
        "draws": DRAWS,
    }


def table(found: Json) -> str:
    """The results in Markdown."""
    exact, entropy = found["exact_bits"], found["entropy_bits"]
    rows = [("ELBO" if count == "1" else f"IWAE, K = {count}", bits) for count, bits in found["bounds_bits"].items()]
    lines = ["| | bits an image | above the likelihood |", "|---|---:|---:|"]
    lines += [f"| {name} | {bits:.3f} | {bits - exact:.3f} |" for name, bits in rows]
    lines += [f"| likelihood, integrated | {exact:.3f} | 0 |", f"| entropy of the data | {entropy:.3f} | |"]
    truth = found["truth"]
    return "\n".join(
        [
            *lines,
            "",
            f"Half of the points in each dimension change no image by more than {found['quadrature_error_bits']:.1g} "
            f"bits. Rate {found['rate_bits']:.2f} bits; of {max(SAMPLES)} importance samples "
            f"{found['effective_samples']:.0f} count.",
            f"Of the model's mass {truth['outside']:.1%} is on no image of the data; total variation "
            f"{truth['total_variation']:.3f}, coverage by {found['draws']:,} draws {truth['coverage']:.3f}.",
        ]
    )


def draw(found: Json, path: Path) -> None:
    """The bounds over K, above the likelihood and the entropy."""
    pyplot = plot.pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    counts = [int(count) for count in found["bounds_bits"]]
    axis.plot(counts, found["bounds_bits"].values(), "o-", color="C0", label="bound from K samples (K = 1: ELBO)")
    axis.axhline(found["exact_bits"], color="C3", label="likelihood, integrated")
    axis.axhline(found["entropy_bits"], color="0.6", label="entropy of the data")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_ylim(0, None)
    axis.set_xlabel("importance samples K")
    axis.set_title("bits an image", fontsize=9, loc="left")
    axis.legend(fontsize=9)
    plot.save(figure, path)
