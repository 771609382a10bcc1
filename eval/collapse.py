"""Posterior collapse on a CPU, and three remedies: the demonstration of docs/vae_theory.md.

    python -m eval.collapse --output runs/collapse            # a few minutes; four runs on scikit-learn's digits

A decoder that is strong enough to do without the latent (it predicts each pixel from the pixels before it) is trained
alone first, as a pretrained language model would be. Then it becomes a VAE's, four times, with the same seed and
data: as the evidence lower bound says, with the KL annealed, with free bits, and with the KL held at a target. The
terms are those of ldm_vae/losses. DIR then holds collapse.json (active units, rate and bound on held-out digits,
before and after), collapse.png and collapse.md.

Legend: B batch, c latent channels, H W pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ldm_vae.autoencoder import Reconstruction
from ldm_vae.digits import LEVELS, digits, held_out
from ldm_vae.errors import UsageError, WorkError, run_program
from ldm_vae.latents import Moments, posterior_noise
from ldm_vae.losses import Schedule, TermConfig
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.kl_free_bits import Config as FreeBits
from ldm_vae.losses.kl_target import Config as KLTarget
from ldm_vae.objective import Objective, rate

CHANNELS = 8  # of the latent, at one position
WIDTH, LAYERS = 64, 6  # of the decoder


# --- a strong decoder -------------------------------------------------------------------------------------------------


class Masked(nn.Conv2d):
    """A 3 x 3 convolution that sees the pixels before this one, in reading order (van den Oord et al. 2016), and this
    one too unless it is the `first`."""

    mask: torch.Tensor

    def __init__(self, channels: int, width: int, first: bool = False) -> None:
        super().__init__(channels, width, 3, padding=1)
        mask = torch.zeros(3, 3)
        mask[0] = 1.0
        mask[1, : 1 if first else 2] = 1.0
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class StrongDecoder(nn.Module):
    """p(pixel | pixels before it, z): logits of each pixel's level [B, LEVELS, H, W], from the true image and
    z [B, c, 1, 1], which every layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Masked(1, WIDTH, first=True)
        self.layers = nn.ModuleList([Masked(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.from_latent = nn.ModuleList([nn.Linear(CHANNELS, WIDTH) for _ in range(LAYERS)])
        self.place = nn.Parameter(0.1 * torch.randn(1, WIDTH, 8, 8))
        self.out = nn.Conv2d(WIDTH, LEVELS, 1)

    def forward(self, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        h = self.first(images) + self.place
        for layer, latent in zip(self.layers, self.from_latent, strict=True):
            h = h + layer(F.relu(h + latent(z.flatten(1))[:, :, None, None]))
        logits: torch.Tensor = self.out(F.relu(h))
        return logits


class Categorical(nn.Module):
    """Nats per pixel: a term of one's own, as a user's module would hold it."""

    domain = "pixels"
    likelihood = True

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        levels = ((target[:, 0] + 1) / 2 * (LEVELS - 1)).round().long()
        return F.cross_entropy(pixels, levels)

    def nats_per_value(self, value: torch.Tensor) -> torch.Tensor:
        return value


class CategoricalConfig(TermConfig):
    kind: Literal["categorical"] = "categorical"

    def build(self) -> Categorical:
        return Categorical()


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


# --- four runs --------------------------------------------------------------------------------------------------------


def remedies(images: int) -> dict[str, TermConfig]:
    """The term on the latent of each run of so many images."""
    return {
        "none": KL(weight=1.0),
        "annealing": KL(weight=1.0, schedule=Schedule(images=images // 2)),
        "free bits": FreeBits(weight=1.0, bits=1.0),
        "target KL": KLTarget(nats_per_pixel=6.0 / 64, beta=1.0, integral_images=2_000),
    }


def pretrain(images: int, batch: int, seed: int) -> Network:
    """The decoder alone, its latent 0."""
    torch.manual_seed(seed)
    training, _ = held_out(digits()[0])
    network, likelihood = Network(), Categorical()
    optimizer = torch.optim.Adam(network.decoder.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed + 1)
    for _ in tqdm(range(images // batch), desc="decoder", unit="step", disable=None, leave=False):
        chosen = training[torch.randint(len(training), (batch,), generator=order)]
        likelihood(network.decoder(chosen, torch.zeros(batch, CHANNELS, 1, 1)), chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


def run(name: str, term: TermConfig, network: Network, images: int, batch: int, seed: int) -> dict[str, Any]:
    """Train one; what it was on held-out digits at the start, in between and at the end."""
    training, test = held_out(digits()[0])
    objective = Objective({"categorical": CategoricalConfig(), "latent": term})
    optimizer = torch.optim.Adam([*network.parameters(), *objective.parameters()], lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    curve = [measure(network, objective, test, 0)]
    every = max(1, images // batch // 20)
    for step in tqdm(range(images // batch), desc=name, unit="step", disable=None, leave=False):
        chosen = training[torch.randint(len(training), (batch,), generator=order)]
        positions = range(step * batch, (step + 1) * batch)
        r = network(chosen, posterior_noise(seed, positions, (CHANNELS, 1, 1)), step * batch)
        total = objective.pixel_terms(r.pixels, r.target, r.images_seen)[0]
        (total + objective.latent_terms(r, r.images_seen)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            curve.append(measure(network, objective, test, (step + 1) * batch))
    return {"remedy": name, "before": curve[0], "after": curve[-1], "curve": curve}


@torch.no_grad()
def measure(network: Network, objective: Objective, test: torch.Tensor, images: int) -> dict[str, float]:
    """Active units, rate, and the evidence lower bound itself (beta 1, no floor) on held-out digits."""
    noise = posterior_noise(1, range(len(test)), (CHANNELS, 1, 1))
    r = network(test, noise, images)
    logs = {"loss/categorical": objective.terms["categorical"](r.pixels, r.target)} | rate(r.moments, r.images)
    logs |= objective.bound(logs, r.images)
    kept = ("active_units", "kl_nats_per_image", "elbo/nats_per_image", "elbo/bits_per_dimension")
    return {"images": images} | {name: float(logs[name]) for name in kept}


# --- results ----------------------------------------------------------------------------------------------------------


def table(found: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        f"| remedy | active units of {CHANNELS}, before | after | rate, nats an image | bound, nats an image | "
        "bits per dimension |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        after = one["after"]
        lines.append(
            f"| {one['remedy']} | {one['before']['active_units']:.0f} | {after['active_units']:.0f} | "
            f"{after['kl_nats_per_image']:.2f} | {after['elbo/nats_per_image']:.2f} | "
            f"{after['elbo/bits_per_dimension']:.3f} |"
        )
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Active units, rate and bound over images seen."""
    try:
        import matplotlib
    except ImportError as error:
        raise WorkError("the plot needs matplotlib: pip install 'ldm-vae[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "active_units": "active units",
        "kl_nats_per_image": "rate, nats an image",
        "elbo/nats_per_image": "evidence lower bound, nats an image",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        for one in found:
            points = one["curve"][1 if "elbo" in name else 0 :]  # the bound at the start is off every scale
            axis.plot([point["images"] for point in points], [point[name] for point in points], label=one["remedy"])
        axis.set_title(title)
        axis.set_xlabel("images seen")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="eval.collapse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--decoder_images", type=int, default=20_000, help="images the decoder sees alone (20,000)")
    parser.add_argument("--images", type=int, default=12_000, help="images each run sees then (12,000)")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a step (32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (0)")
    options = parser.parse_args()
    if options.images < options.batch_size or options.batch_size < 1:
        raise UsageError(f"images: expected at least a batch of {options.batch_size}, got {options.images}")
    strong = pretrain(options.decoder_images, options.batch_size, options.seed)
    found = [
        run(name, term, copy.deepcopy(strong), options.images, options.batch_size, options.seed)
        for name, term in remedies(options.images).items()
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "collapse.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.output / "collapse.md").write_text(table(found) + "\n", encoding="utf-8")
    plot(found, options.output / "collapse.png")
    print(table(found))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    run_program(main)
