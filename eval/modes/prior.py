"""A trained prior over codes, beside the true distribution of the images.

An image is encoded to its codes, so the truth is a distribution over arrays of codes: images with the same codes are
one outcome. Of all other arrays the prior should give none a probability. What an array decodes to is a question of its
own: a decoded sample counts as an image of the data if its values, rounded to 0 and 255, are that image's.

Legend: N images, G outcomes, h w positions, K codes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.data.transforms import to_pixels
from ldm_vae.demo import factors
from ldm_vae.latent_space.enumeration import compare, entropy_bits, look_up, merged, sampled
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.sampling import SamplingConfig

from . import plot

Json = dict[str, Any]

ROWS = {
    "prior": "prior",
    "independent": "independent codes, by position",
    "training": "frequencies of the training images",
}


@torch.no_grad()
def run(options: argparse.Namespace) -> Json:
    """Probability of each image under the prior of --run, and the samples that it draws."""
    generator = CodeGenerator.load(options.run, load_autoencoder(options.vae))
    check(generator)
    images, probabilities = factors.images(), factors.probabilities()
    codes = encode(generator.vae, images, options.batch_size)
    if codes.shape[1:] != generator.shape:
        wanted, got = (" x ".join(map(str, shape)) for shape in (generator.shape, codes.shape[1:]))
        raise UsageError(
            f"run {options.run}: expected a prior of codes {got}, which images of 16 px have, got {wanted}"
        )
    outcomes, truth, of = merged(codes, probabilities)

    # --- the exact probability of every outcome, in fp64 --------------------------------------------------------------
    prior = generator.prior.double()
    parts = torch.arange(len(outcomes)).split(options.batch_size)
    nats = torch.cat([prior.nats(outcomes[some], generator.labels(some.tolist()), 0, some.tolist()) for some in parts])
    seen = torch.zeros(len(outcomes), dtype=torch.float64)
    seen.index_add_(0, of[factors.draws("train", factors.PARTS["train"])], seen.new_ones(factors.PARTS["train"]))
    models = {
        "prior": nats,
        "independent": independent(outcomes, truth, generator.codes),
        "training": -(seen / seen.sum()).log(),
    }
    unseen = seen == 0

    # --- samples: which outcomes, and which images they decode to -----------------------------------------------------
    drawn, decoded = [], []
    for some in torch.arange(options.samples).split(options.batch_size):
        keys = some.tolist()
        drawn.append(prior.sample(generator.labels(keys), generator.seed, keys, SamplingConfig()))
        decoded.append(generator.decode(drawn[-1]))
    again = torch.cat([generator.decode(codes[some]) for some in torch.arange(len(codes)).split(options.batch_size)])
    pictures = look_up(images > 0, torch.cat(decoded) > 0)
    return {
        "images": len(images),
        "outcomes": len(outcomes),
        "entropy_bits": entropy_bits(probabilities),
        "entropy_of_codes_bits": entropy_bits(truth),
        "samples": options.samples,
        "models": {name: compare(truth, found, options.samples) for name, found in models.items()},
        "drawn": {
            "codes": sampled(truth, look_up(outcomes, torch.cat(drawn))),
            "pictures": sampled(probabilities, pictures),
        },
        # of the truth's mass, how much decodes from its own codes to itself
        "reconstructed": float(probabilities[look_up(images > 0, again > 0) == torch.arange(len(images))].sum()),
        "unseen": {"truth": float(truth[unseen].sum()), "prior": float(torch.exp(-nats[unseen]).sum())},
        "log2_p": {"truth": truth.log2().tolist(), "prior": (-nats / math.log(2)).tolist(), "seen": (~unseen).tolist()},
    }


def check(generator: CodeGenerator) -> None:
    if not generator.prior.is_exact:
        raise UsageError(f"run: expected a prior with an exact likelihood (transformer), got {generator.model.kind}")
    if generator.classes:
        raise UsageError("run: expected a prior without classes (conditional: false), this one has some")


def encode(vae: Any, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Images uint8 [N, 3, H, W] => indices [N, q, h, w]."""
    parts = []
    for some in images.split(batch_size):
        indices = latents.nearest_codes(vae, finite.encode(vae, to_pixels(some)).mean)
        parts.append(indices if indices.ndim == 4 else indices[:, None])
    return torch.cat(parts)


def independent(outcomes: torch.Tensor, truth: torch.Tensor, codes: int) -> torch.Tensor:
    """-log p of outcomes [G, ...] under the product of the true distributions of each position."""
    rows = outcomes.flatten(1)
    tables = torch.zeros(rows.shape[1], codes, dtype=torch.float64)
    tables.scatter_add_(1, rows.T, truth.expand(rows.shape[1], -1))
    return -tables.gather(1, rows.T).log().sum(dim=0)


def table(found: Json) -> str:
    """The results in Markdown."""
    lines = [
        "| | cross-entropy, bits | KL(truth, model), bits | total variation | mass outside | coverage |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, title in ROWS.items():
        one = found["models"][name]
        bits = ["infinite" if one[key] is None else f"{one[key]:.3f}" for key in ("cross_entropy_bits", "kl_bits")]
        shares = [f"{one[key]:.3f}" for key in ("total_variation", "outside", "coverage")]
        lines.append(f"| {title} | {' | '.join(bits + shares)} |")
    codes, pictures = found["drawn"]["codes"], found["drawn"]["pictures"]
    return "\n".join(
        [
            *lines,
            "",
            f"{found['images']:,} images of {found['entropy_bits']:.3f} bits have {found['outcomes']:,} arrays of "
            f"codes of {found['entropy_of_codes_bits']:.3f} bits; {found['reconstructed']:.1%} of the mass decodes to "
            "itself.",
            f"Of {found['samples']:,} samples {codes['valid']:.1%} are codes of an image, and {pictures['valid']:.1%} "
            f"decode to one; they hold {codes['coverage']:.1%} and {pictures['coverage']:.1%} of the mass.",
            f"Codes that no training image has: {found['unseen']['truth']:.2%} of the mass, to which the prior gives "
            f"{found['unseen']['prior']:.2%}.",
        ]
    )


def draw(found: Json, path: Path) -> None:
    """Probability of each outcome under the prior over the true one."""
    pyplot = plot.pyplot()
    truth, prior, seen = (found["log2_p"][name] for name in ("truth", "prior", "seen"))
    figure, axis = pyplot.subplots(figsize=(5, 4.4), layout="constrained")
    ends = [min(truth) - 0.5, max(truth) + 0.5]
    axis.plot(ends, ends, color="0.6", linewidth=1, label="equal")
    for name, colour, wanted in (("seen in training", "C0", True), ("not seen in training", "C3", False)):
        chosen = [place for place, own in enumerate(seen) if own is wanted]
        axis.scatter([truth[at] for at in chosen], [prior[at] for at in chosen], s=6, color=colour, label=name)
    axis.set_xlabel("true probability, log2")
    axis.set_title("probability under the prior, log2", fontsize=9, loc="left")
    axis.legend(fontsize=9)
    plot.save(figure, path)
