"""`eval.speed quality`: the same minutes for every recipe, and what came of them on photographs that none has seen.

Each contender trains the same small network on the same crops in the same order (the demo's photographs, LPIPS-alex and
a small PatchGAN from the first step), until it has used `--minutes` of one core. They take turns in slices, so that
what slows the machine down slows all of them; the clock is the process's own (other programs on the machine count only
as far as they take the cache), runs on one thread, and stands still while a network is measured: PSNR, LPIPS-alex and
delta E 2000 by the pinned protocol, on the held-out photographs whole. A start that is fitted has its fit on the
clock. The curves of each factor and seed are kept in DIR as they are finished; a launch that finds them goes on from
there.

- `quality_F_RECIPE`: f4 or f8; LPIPS over the last quarter of the minutes (the mean over its measurements and over
  seeds), PSNR, delta E, images seen, the `curve`, and the `minutes` until LPIPS 0.30, null if it was not reached;
- `..._zero`: residual branches that begin as nothing; `..._linear`: `init: linear`; `l1_first_linear`: ours from there
  with L1 + 0.1 LPIPS and without an adversary, as the demo begins; the others begin from random weights;
- `quality_F_images`: images that ours saw over images that a recipe saw: what its step costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.autoencoder.linear_code import PatchMoments
from ldm_vae.autoencoder.linear_init import start_linear
from ldm_vae.autoencoder.linear_layers import clear_residuals
from ldm_vae.core import atomic_io
from ldm_vae.core.progress import Progress
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import read_image
from ldm_vae.data.source import Source, open_source
from ldm_vae.data.transforms import TransformConfig, to_pixels
from ldm_vae.demo.photographs import prepare_demo
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.select import build_metrics

from .recipes import RECIPES, Networks, Workload

OWN = "train_step"
PUBLISHED = ("latent_diffusion", "diffusers_published", "diffusers_repaired", "shared_forward")
F4 = Workload(
    widths=(24, 48, 64), groups=2, latent_channels=8, resolution=64, batch=8, net="alex", genuine=True, critic_width=32,
    critic_layers=2, adversary_weight=0.1, learning_rate=5e-4,
)  # fmt: skip
WORKS = {"f4": F4, "f8": replace(F4, widths=(24, 48, 64, 64), latent_channels=16)}
LINEAR_RATE = 1e-4  # weights that already do something want smaller steps; from noise 5e-4 was the better of the two
# name => (recipe, start, what of the work is another)
CONTENDERS: dict[str, tuple[str, str, dict[str, float]]] = {
    OWN: (OWN, "noise", {}),
    f"{OWN}_zero": (OWN, "zero", {}),
    f"{OWN}_linear": (OWN, "linear", {}),
    "l1_first_linear": (OWN, "linear", {"lpips_weight": 0.1, "adversary_weight": 0.0}),
    **{name: (name, "noise", {}) for name in PUBLISHED},
    **{f"{name}_linear": (name, "linear", {}) for name in PUBLISHED},
}
TURNS = 12  # slices of each, and points of a curve
LAST = 3  # of them make the final score: LPIPS goes up and down where an adversary plays
SCORES = ("lpips_alex", "psnr", "delta_e")
REACHED = 0.30  # LPIPS
FITTED = 1024  # crops

Curve = list[dict[str, float]]  # scores, minutes and images so far, at each turn


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder) / "demo"
            prepare_demo(demo)
            rows = []
            for factor, work in WORKS.items():
                runs = []
                for seed in range(options.seeds):
                    kept = options.output / f"quality_{factor}_{options.minutes:g}_minutes_seed_{seed}.json"
                    if not kept.exists():
                        curves = _compete(
                            demo, replace(work, seed=seed), options.minutes * 60, f"{factor}, seed {seed}"
                        )
                        atomic_io.replace(kept, atomic_io.data(json.dumps(curves).encode()))
                    runs.append(json.loads(kept.read_text(encoding="utf-8")))
                rows += _rows(f"quality_{factor}_", runs)
            return rows
    finally:
        torch.set_num_threads(threads)


class Contender:
    """A recipe with networks, data and a clock of its own."""

    def __init__(self, name: str, source: Source, work: Workload) -> None:
        recipe, start, changes = CONTENDERS[name]
        rate = LINEAR_RATE if start == "linear" else work.learning_rate
        networks = Networks(replace(work, learning_rate=rate, **changes))
        self.vae, self.step = networks.network.vae, RECIPES[recipe](networks)
        self.work, self.images, self.seconds = work, 0, 0.0
        self.curve: Curve = []
        self.loader = self._crops(source)
        begun = time.process_time()
        self._start(start, source)
        self.seconds = time.process_time() - begun

    def _crops(self, source: Source) -> Any:
        crops = TransformConfig(resize="none")
        return training_loader(source, crops, self.work.resolution, seed=self.work.seed, batch_size=self.work.batch)

    @torch.no_grad()
    def _start(self, kind: str, source: Source) -> None:
        if kind == "zero":
            clear_residuals(self.vae)
        if kind == "linear":
            moments = PatchMoments(downsampling_factor(self.vae), 3)
            for batch in itertools.islice(self._crops(source), FITTED // self.work.batch):
                moments.update(batch.pixels)
            start_linear(self.vae, moments.code(self.work.latent_channels))

    def train(self, until: float) -> None:
        """Steps until the clock shows so many seconds."""
        start = time.process_time() - self.seconds
        while self.seconds < until:
            images = to_pixels(next(self.loader).pixels)
            torch.manual_seed(
                self.work.seed + self.images
            )  # of the posterior's noise: that of the batch, for every recipe
            self.step(images)
            self.images += len(images)
            self.seconds = time.process_time() - start

    @torch.inference_mode()
    def measure(self, photographs: list[torch.Tensor]) -> None:
        """A point of the curve: scores of the photographs [1, C, H, W]."""
        metrics = build_metrics(SCORES, torch.device("cpu"), self.work.resolution)
        for number, pixels in enumerate(photographs):
            decoded = latents.decode(self.vae, latents.encode(self.vae, pixels).mean)
            for metric in metrics:
                metric.update(PINNED.pair(pixels, decoded, [number]))
        scores = {metric.name: float(metric.compute().mean or 0.0) for metric in metrics}
        self.curve.append({"minutes": self.seconds / 60, "images": self.images} | scores)


def _compete(demo: Path, work: Workload, seconds: float, title: str) -> dict[str, Curve]:
    source = open_source(demo / "train")
    held_out = open_source(demo / "photographs" / "heldout")
    photographs = [
        to_pixels(read_image(held_out[index].image, held_out.decoding).pixels[None]) for index in range(len(held_out))
    ]
    contenders = {name: Contender(name, source, work) for name in CONTENDERS}
    for contender in contenders.values():
        contender.measure(photographs)
    for turn in Progress(range(1, TURNS + 1), desc=f"quality, {title}", unit="turn", leave=False):
        for contender in contenders.values():
            contender.train(seconds * turn / TURNS)
            contender.measure(photographs)
    return {name: contender.curve for name, contender in contenders.items()}


def _rows(prefix: str, runs: list[dict[str, Curve]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in CONTENDERS:
        finals = {score: [_final(run[name], score) for run in runs] for score in SCORES}
        means = {score: statistics.mean(values) for score, values in finals.items()}
        curve = _mean_curve([run[name] for run in runs])
        reached = [point["minutes"] for point in curve if point["lpips_alex"] <= REACHED]
        rows.append(
            {"name": f"{prefix}{name}", "value": means.pop("lpips_alex"), "unit": "LPIPS", **means}
            | {"images": curve[-1]["images"], "minutes": min(reached, default=None)}
            | {"seeds": finals, "curve": curve}
        )
    own = statistics.mean(run[OWN][-1]["images"] for run in runs)
    for name in PUBLISHED:
        ratios = [run[OWN][-1]["images"] / run[name][-1]["images"] for run in runs]
        ratio = {"to": name, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append({"name": f"{prefix}images", "value": own, "unit": "images", "ratio": ratio})
    return rows


def _mean_curve(curves: list[Curve]) -> Curve:
    return [
        {name: statistics.mean(point[name] for point in points) for name in points[0]}
        for points in zip(*curves, strict=True)
    ]


def _final(curve: Curve, score: str) -> float:
    return statistics.mean(point[score] for point in curve[-LAST:])
