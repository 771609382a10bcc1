"""Posterior collapse on a CPU, and three remedies: the demonstration of docs/vae_theory.md.

    python -m eval.collapse --output runs/collapse            # some minutes; three seeds on scikit-learn's digits
    python -m eval.collapse --output runs/collapse --seeds 1  # a third of it

A decoder that is strong enough to do without the latent (it predicts each pixel from all pixels before it) is trained
alone first, as a pretrained language model would be. Then it becomes a VAE's, four times, with the same seed and
data: as the evidence lower bound says, with the KL annealed, with free bits, and with the KL held at a target. The
terms are those of ldm_vae/losses. DIR then holds collapse.json (active units, rate and bound on held-out digits,
before, in between and after), collapse.png and collapse.md.

The digits are black and white: a pixel is on with the probability that its grey level says, drawn anew each time it is
trained on (Salakhutdinov & Murray 2008), so that no latent is needed to learn 1,437 images by heart.

Legend: B batch, c latent channels, H W pixels, n units of a layer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.ownership import own
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.demo.digits import digits, held_out
from ldm_vae.losses import Schedule, TermConfig
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.kl_free_bits import Config as FreeBits
from ldm_vae.losses.kl_target import Config as KLTarget
from ldm_vae.metrics import result
from ldm_vae.run.optim import schedule, set_learning_rate
from ldm_vae.training.objective import Objective, rate

CHANNELS = 8  # of the latent, at one position
PIXELS = 64
WIDTH, LAYERS = 512, 2  # of the decoder
ALONE, TOGETHER = 2e-3, 1e-3  # learning rates at the start; both fall along a half cosine


# --- a strong decoder -------------------------------------------------------------------------------------------------


class Masked(nn.Linear):
    """A linear layer whose outputs see the inputs that stand before them in an order (or, `strictly`, not at it)."""

    mask: torch.Tensor

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor, strictly: bool = False) -> None:
        """inputs [n], outputs [m]: the place of each unit in the order."""
        super().__init__(len(inputs), len(outputs))
        seen = outputs[:, None] > inputs if strictly else outputs[:, None] >= inputs
        self.register_buffer("mask", seen.to(self.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class StrongDecoder(nn.Module):
    """p(pixel | all pixels before it, z): a masked autoregressive network (Germain et al., ICML 2015), z being what
    stands before the first pixel. From the true image and z [B, c, 1, 1] => logits [B, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        order = torch.cat([torch.zeros(CHANNELS), torch.arange(1, PIXELS + 1)])
        hidden = torch.arange(WIDTH) % PIXELS
        self.first = Masked(order, hidden)
        self.layers = nn.ModuleList([Masked(hidden, hidden) for _ in range(LAYERS)])
        self.last = Masked(hidden, order[CHANNELS:], strictly=True)
        with torch.no_grad():  # trained alone it knows no z, and it starts in the VAE as it was alone
            self.first.weight[:, :CHANNELS] = 0.0

    def forward(self, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        h = self.first(torch.cat([z.flatten(1), images.flatten(1)], dim=1))
        for layer in self.layers:
            h = h + layer(F.relu(h))
        logits: torch.Tensor = self.last(F.relu(h)).view_as(images)
        return logits


class Bernoulli(nn.Module):
    """Nats per pixel: a term of one's own, as a user's module would hold it."""

    domain = "pixels"
    likelihood = True

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(pixels, (target + 1) / 2)

    def nats_per_value(self, value: torch.Tensor) -> torch.Tensor:
        return value


class BernoulliConfig(TermConfig):
    kind: Literal["bernoulli"] = "bernoulli"

    def build(self) -> Bernoulli:
        return Bernoulli()


class Network(nn.Module):
    """An encoder of one position, and the strong decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * CHANNELS)
        )
        self.decoder = StrongDecoder()

    def forward(self, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Reconstruction:
        moments = Moments.from_parameters(self.encoder(images)[:, :, None, None])
        z = moments.sample(noise)
        pixels = self.decoder(images, z)
        return Reconstruction(images, pixels, images, moments, z, z.detach(), images_seen=images_seen)


# --- black and white digits -------------------------------------------------------------------------------------------


def draw(greys: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Grey images in [-1, 1] => black and white ones of -1 and 1."""
    return torch.bernoulli((greys + 1) / 2, generator=generator) * 2 - 1


def batches(images: int, size: int, seed: int, what: str) -> Iterator[tuple[int, torch.Tensor]]:
    """(images seen before it, a batch of training digits), until so many have been seen."""
    training, _ = held_out(digits()[0])
    generator = torch.Generator().manual_seed(seed)
    for step in Progress(range(images // size), desc=what, unit="step", leave=False):
        yield step * size, draw(training[torch.randint(len(training), (size,), generator=generator)], generator)


def unseen_digits() -> torch.Tensor:
    """The held-out digits, drawn once and for all."""
    return draw(held_out(digits()[0])[1], torch.Generator().manual_seed(0))


# --- the runs ---------------------------------------------------------------------------------------------------------


def remedies(images: int) -> dict[str, TermConfig]:
    """The term on the latent of each run of so many images."""
    return {
        "none": KL(weight=1.0),
        "annealing": KL(weight=1.0, schedule=Schedule(start_images=images // 5, images=2 * images // 5)),
        "free bits": FreeBits(weight=1.0, bits=0.5),
        "target KL": KLTarget(nats_per_pixel=3.0 / PIXELS, beta=1.0),
    }


def pretrain(images: int, batch: int, seed: int) -> Network:
    """The decoder alone, its latent 0."""
    torch.manual_seed(seed)
    network, likelihood = Network(), Bernoulli()
    optimizer = torch.optim.Adam(network.decoder.parameters())
    for seen, chosen in batches(images, batch, 2 * seed, f"decoder {seed}"):
        set_learning_rate(optimizer, ALONE * schedule(seen, 0, images, "cosine"))
        likelihood(network.decoder(chosen, torch.zeros(batch, CHANNELS, 1, 1)), chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


def run(name: str, term: TermConfig, network: Network, images: int, batch: int, seed: int) -> dict[str, Any]:
    """Train one; what it was on held-out digits at the start, in between and at the end."""
    test = unseen_digits()
    objective = Objective({"bernoulli": BernoulliConfig(), "latent": term})
    optimizer = torch.optim.Adam([*network.parameters(), *objective.parameters()])
    curve = [measure(network, objective, test, 0)]
    every, last = max(batch, images // 20), images // batch * batch
    for seen, chosen in batches(images, batch, 2 * seed + 1, f"{name} {seed}"):
        set_learning_rate(optimizer, TOGETHER * schedule(seen, 0, images, "cosine"))
        r = network(chosen, posterior_noise(seed, range(seen, seen + batch), (CHANNELS, 1, 1)), seen)
        total = objective.pixel_terms(r.pixels, r, r.images_seen)[0]
        (total + objective.latent_terms(r, r.images_seen)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_update()
        if (seen + batch) // every > seen // every or seen + batch == last:
            curve.append(measure(network, objective, test, seen + batch))
    return {"remedy": name, "seed": seed, "before": curve[0], "after": curve[-1], "curve": curve}


@torch.no_grad()
def measure(network: Network, objective: Objective, test: torch.Tensor, images: int) -> dict[str, float]:
    """Active units, rate, and the evidence lower bound itself (beta 1, no floor) on held-out digits."""
    noise = posterior_noise(1, range(len(test)), (CHANNELS, 1, 1))
    r = network(test, noise, images)
    logs = {"loss/bernoulli": objective.terms["bernoulli"](r.pixels, r.target)} | rate(r.moments, r.images)
    logs |= objective.bound(logs, r.images)
    return {"images": images} | {name: float(logs[name]) for name in FIGURES}


# --- results ----------------------------------------------------------------------------------------------------------

FIGURES = {  # as logged => its title, and the decimals that mean something
    "active_units": ("active units", 0),
    "kl_nats_per_image": ("rate, nats an image", 2),
    "elbo/nats_per_image": ("evidence lower bound, nats an image", 2),
}
SHOWN = {"kl_nats_per_image": (0, 10), "elbo/nats_per_image": (-32, -21)}  # of the plot: what lies beyond is cut off


def spread(values: list[float], decimals: int) -> str:
    """Mean of the seeds, and where they differ the smallest and the largest."""
    shown = [f"{value:.{decimals}f}" for value in (mean(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def table(found: list[dict[str, Any]]) -> str:
    """The results in Markdown, a row for each remedy."""
    titles = [title for title, _ in FIGURES.values()]
    lines = [
        f"| remedy | {titles[0]} of {CHANNELS}, before | after | {titles[1]} | {titles[2]} |",
        "|---|---|---|---|---|",
    ]
    for remedy in dict.fromkeys(one["remedy"] for one in found):
        runs = [one for one in found if one["remedy"] == remedy]
        cells = [spread([one["before"]["active_units"] for one in runs], 0)]
        cells += [spread([one["after"][name] for one in runs], decimals) for name, (_, decimals) in FIGURES.items()]
        lines.append(f"| {remedy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Active units, rate and bound over images seen, a line for each run."""
    try:
        import matplotlib
    except ImportError as error:
        raise WorkError("the plot needs matplotlib: pip install 'ldm-vae[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(dict.fromkeys(one["remedy"] for one in found), ("C3", "C0", "C2", "C1"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (name, (title, _)) in zip(axes, FIGURES.items(), strict=True):
        for one in found:
            images, values = ([point[key] for point in one["curve"]] for key in ("images", name))
            label = one["remedy"] if one["seed"] == 0 else None
            axis.plot(images, values, color=colours[one["remedy"]], label=label, linewidth=1)
        # before the weight has risen an annealed run spends a hundred nats
        ends = SHOWN.get(name)
        axis.set_title(f"{title}, {ends[0]} to {ends[1]}" if ends else f"{title} of {CHANNELS}", fontsize=9)
        axis.set_ylim(ends)
        axis.set_xlabel("images seen")
    axes[0].legend(fontsize=9, title="a line for each seed", title_fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = Parser(program="eval.collapse", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--decoder_images", type=int, default=40_000, help="images the decoder sees alone (40,000)")
    parser.add_argument("--images", type=int, default=40_000, help="images each run sees then (40,000)")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions, of weights, order and noise (3)")
    options = parser.parse_args()
    if options.batch_size < 1 or options.images < options.batch_size:
        raise UsageError(f"images: expected at least a batch of {options.batch_size}, got {options.images}")
    if options.seeds < 1:
        raise UsageError(f"seeds: expected 1 or more, got {options.seeds}")
    with own(options.output, "output"):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    found = []
    for seed in range(options.seeds):
        strong = pretrain(options.decoder_images, options.batch_size, seed)
        for name, term in remedies(options.images).items():
            found.append(run(name, term, copy.deepcopy(strong), options.images, options.batch_size, seed))
    result.write(options.output / "collapse.json", found)
    result.write(options.output / "collapse.md", table(found) + "\n")
    plot(found, options.output / "collapse.png")
    print(table(found))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    run_program(main)
