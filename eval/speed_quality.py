"""`eval.speed quality`: the same minutes for every recipe, and what came of them on photographs that none has seen.

Each recipe trains the same small network from the same initial weights on the same crops in the same order (the demo's
photographs, LPIPS-alex and a small PatchGAN from the first step), until it has used `--minutes` of one core. They take
turns in slices, so that what slows the machine down slows all of them; the clock is the process's own (other programs
on the machine count only as far as they take the cache), runs on one thread, and stands still while a network is
measured: PSNR and LPIPS-alex by the pinned protocol, on the held-out photographs whole.

- `quality_RECIPE`: LPIPS over the last quarter of the minutes (the mean over its measurements and over seeds), PSNR,
  images seen, and the `curve`;
- `quality_images`: images that ours saw over images that a recipe saw: what its step costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ldm_vae import latents
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import read_image
from ldm_vae.data.source import Source, open_source
from ldm_vae.data.transforms import TransformConfig, to_pixels
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.select import build_metrics
from ldm_vae.photographs import prepare_demo

from .recipes import RECIPES, Networks, Work

OWN = "train_step"
CONTENDERS = (OWN, "latent_diffusion", "diffusers_published", "diffusers_repaired", "shared_forward")
WORK = Work(
    widths=(16, 32, 64), resolution=64, batch=8, net="alex", genuine=True, critic_width=32, critic_layers=2, groups=8,
    adversary_weight=0.1, learning_rate=5e-4,
)  # fmt: skip
TURNS = 12  # slices of each, and points of a curve
LAST = 3  # of them make the final score: LPIPS goes up and down where an adversary plays
SCORES = ("lpips_alex", "psnr")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder) / "demo"
            prepare_demo(demo)
            runs = [_compete(demo, seed, options.minutes * 60) for seed in range(options.seeds)]
            return _rows(runs)
    finally:
        torch.set_num_threads(threads)


class Contender:
    """A recipe with networks, data and a clock of its own."""

    def __init__(self, name: str, source: Source, seed: int) -> None:
        networks = Networks(replace(WORK, seed=seed))
        self.vae, self.step = networks.network.vae, RECIPES[name](networks)
        crops = TransformConfig(resize="none")
        self.loader = training_loader(source, crops, WORK.resolution, seed=seed, batch_size=WORK.batch)
        self.seed, self.images, self.seconds = seed, 0, 0.0
        self.curve: list[dict[str, float]] = []

    def train(self, until: float) -> None:
        """Steps until the clock shows so many seconds."""
        start = time.process_time() - self.seconds
        while self.seconds < until:
            images = to_pixels(next(self.loader).pixels)
            torch.manual_seed(self.seed + self.images)  # of the posterior's noise: that of the batch, for every recipe
            self.step(images)
            self.images += len(images)
            self.seconds = time.process_time() - start

    @torch.inference_mode()
    def measure(self, photographs: list[torch.Tensor]) -> None:
        """A point of the curve: scores of the photographs [1, C, H, W]."""
        metrics = build_metrics(SCORES, torch.device("cpu"), WORK.resolution)
        for number, pixels in enumerate(photographs):
            decoded = latents.decode(self.vae, latents.encode(self.vae, pixels).mean)
            for metric in metrics:
                metric.update(PINNED.pair(pixels, decoded, [number]))
        scores = {metric.name: float(metric.compute().mean or 0.0) for metric in metrics}
        self.curve.append({"minutes": self.seconds / 60, "images": self.images} | scores)


def _compete(demo: Path, seed: int, seconds: float) -> dict[str, Contender]:
    source = open_source(demo / "train")
    held_out = open_source(demo / "photographs" / "heldout")
    photographs = [
        to_pixels(read_image(held_out[index].image, held_out.decoding).pixels[None]) for index in range(len(held_out))
    ]
    contenders = {name: Contender(name, source, seed) for name in CONTENDERS}
    for turn in tqdm(range(1, TURNS + 1), desc=f"quality, seed {seed}", unit="turn", disable=None, leave=False):
        for contender in contenders.values():
            contender.train(seconds * turn / TURNS)
            contender.measure(photographs)
    return contenders


def _rows(runs: list[dict[str, Contender]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in CONTENDERS:
        finals = {score: [_final(run[name], score) for run in runs] for score in SCORES}
        rows.append(
            {"name": f"quality_{name}", "value": statistics.mean(finals["lpips_alex"]), "unit": "LPIPS"}
            | {"psnr": statistics.mean(finals["psnr"]), "images": statistics.mean(run[name].images for run in runs)}
            | {"seeds": finals, "curve": _mean_curve([run[name].curve for run in runs])}
        )
    own = statistics.mean(run[OWN].images for run in runs)
    for name in CONTENDERS[1:]:
        ratios = [run[OWN].images / run[name].images for run in runs]
        ratio = {"to": name, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append({"name": "quality_images", "value": own, "unit": "images", "ratio": ratio})
    return rows


def _mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [
        {name: statistics.mean(point[name] for point in points) for name in points[0]}
        for points in zip(*curves, strict=True)
    ]


def _final(contender: Contender, score: str) -> float:
    return statistics.mean(point[score] for point in contender.curve[-LAST:])
