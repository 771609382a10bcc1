"""Disentanglement of beta-VAEs, by weights of the KL and by seeds, beside the same models with their latents rotated.

A rotation of the latent, undone by the decoder, changes no probability of any image, so no unsupervised figure of the
model of images tells one from the other; their mutual information gaps differ (Locatello et al., ICML 2019).

Legend: N images, c latent dimensions, F factors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.core import rng
from ldm_vae.demo import factors
from ldm_vae.latent_space.disentanglement import entropies, information_gaps, mutual_information, rotated

from . import plot
from .network import Likelihood, Network, pixels, train

Json = dict[str, Any]

DIMENSIONS = 6  # one more than there are factors
ROTATIONS = 5


def run(options: argparse.Namespace) -> Json:
    """Train a network for each weight and seed."""
    found = []
    for beta in options.betas:
        for seed in range(options.seeds):
            network, sigma = train(DIMENSIONS, beta, options.images, options.batch_size, seed)
            found.append({"beta": beta, "seed": seed} | measure(network, sigma))
    return {"dimensions": DIMENSIONS, "factors": [*factors.FACTORS], "rotations": ROTATIONS, "runs": found}


@torch.no_grad()
def measure(network: Network, sigma: float) -> Json:
    """Mutual information of each latent dimension with each factor as a share of the factor's entropy [c, F], the gaps,
    those of rotations, and rate and bound in nats."""
    images, values, probabilities = pixels(), factors.values(), factors.probabilities()
    moments = network.encode(images)
    noise = posterior_noise(0, range(len(images)), moments.mean.shape[1:])
    rate = moments.kl().double().flatten(1).sum(dim=1)
    nats = Likelihood(network, sigma, images).each(moments.sample(noise).flatten(1)) - rate
    flat, entropy = Moments(moments.mean.flatten(1), moments.logvar.flatten(1)), entropies(values, probabilities)
    information = mutual_information(flat, values, probabilities)
    gaps = information_gaps(information, entropy)
    turned = [
        float(information_gaps(mutual_information(rotated(flat, rotation(key)), values, probabilities), entropy).mean())
        for key in range(ROTATIONS)
    ]
    return {
        "mig": float(gaps.mean()),
        "gaps": gaps.tolist(),
        "rotated": turned,
        "information": (information / entropy).tolist(),
        "rate_nats": float((probabilities * rate).sum()),
        "elbo_nats": float((probabilities * nats).sum()),
    }


def rotation(key: int) -> torch.Tensor:
    """A uniformly distributed orthogonal matrix [c, c], by key (Mezzadri 2007)."""
    normal = rng.normal(0, "rotation", [key], (DIMENSIONS, DIMENSIONS))[0].double()
    orthogonal, triangle = torch.linalg.qr(normal)
    return orthogonal * triangle.diagonal().sign()


def table(found: Json) -> str:
    """The results in Markdown, a row for each weight."""
    lines = [
        "| beta | MIG, mean (smallest to largest) | the same models, rotated | rate, nats | ELBO, nats |",
        "|---:|---|---|---:|---:|",
    ]
    for beta in dict.fromkeys(one["beta"] for one in found["runs"]):
        runs = [one for one in found["runs"] if one["beta"] == beta]
        cells = [spread([one["mig"] for one in runs]), spread([turned for one in runs for turned in one["rotated"]])]
        means = [f"{mean(one[name] for one in runs):.2f}" for name in ("rate_nats", "elbo_nats")]
        lines.append(f"| {beta:g} | {' | '.join([*cells, *means])} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(found: Json, path: Path) -> None:
    """The gaps over weights, a dot for each seed; and the information of the best and the worst of all."""
    pyplot = plot.pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    betas = list(dict.fromkeys(one["beta"] for one in found["runs"]))
    for number, (name, colour) in enumerate((("mig", "C0"), ("rotated", "0.6"))):
        points = [
            (betas.index(one["beta"]) + 0.2 * number - 0.1, value)
            for one in found["runs"]
            for value in (one[name] if name == "rotated" else [one[name]])
        ]
        label = "as trained, a dot for each seed" if name == "mig" else "the same models, rotated"
        axes[0].scatter(*zip(*points, strict=True), s=12, color=colour, label=label)
    axes[0].set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes[0].set_xlabel("beta")
    axes[0].set_ylim(0, 1.4 * axes[0].dataLim.y1)  # room for the legend
    axes[0].set_title("mutual information gap", fontsize=9, loc="left")
    axes[0].legend(fontsize=9)
    ordered = sorted(found["runs"], key=lambda one: one["mig"])
    for axis, one, which in ((axes[1], ordered[-1], "largest"), (axes[2], ordered[0], "smallest")):
        shown = axis.imshow(one["information"], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(found["factors"])), found["factors"])
        axis.set_ylabel("latent dimension")
        title = f"{which} gap, {one['mig']:.2f}: beta {one['beta']:g}, seed {one['seed']}"
        axis.set_title(title, fontsize=9, loc="left")
    figure.colorbar(shown, ax=axes[2], label="information / entropy of the factor")
    plot.save(figure, path)
