"""`eval.speed train`: one generator and one discriminator update, beside published recipes on the same work.

- `train_step`: seconds, in turns (eval/speed/recipes.py says what each recipe does);
- `train_step_flops`: operations, counted on tensors without content. `ideal` is what no recipe can leave out: forward
  and backward of the autoencoder once, LPIPS forward on both images and its input gradient once, discriminator forward
  three times, its input gradient once and its backward once (`eval.speed compiled`: of compiled graphs);
- `train_step_memory`: the growth of the process's resident memory over four updates, each recipe in a process of its
  own, and `counted_bytes`: the most bytes that tensors held, free of the allocator.
"""

from __future__ import annotations

import argparse
import multiprocessing
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.core.flop_counter import Cost
from ldm_vae.core.progress import Progress

from .recipes import (
    RECIPES,
    Networks,
    Step,
    Workload,
)
from .timing import PeakMemory, interleave, row

TIMED = Workload()
MEMORY = Workload(batch=4)
REFERENCES = ("latent_diffusion", "diffusers_published", "diffusers_repaired", "shared_forward", "autoencoder_only")
VARIANTS = ("small_gpu", "decoder_from_store")  # of ours


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    return [*_times(TIMED, options.rounds), *_operations(TIMED), *_memory(MEMORY)]


# --- seconds ----------------------------------------------------------------------------------------------------------


def _times(work: Workload, rounds: int) -> list[dict[str, Any]]:
    images = work.images()
    steps = {name: bound(RECIPES[name](Networks(work)), images) for name in ("train_step", *REFERENCES, *VARIANTS)}
    times = interleave(steps, rounds, "train")
    shape = {"batch": work.batch, "resolution": work.resolution}
    rows = [row("train_step", times, "train_step", to, **shape) for to in REFERENCES]
    rows += [row(name, times, name, None, **shape) for name in REFERENCES]
    return rows + [row(f"train_step_{name}", times, name, "train_step", **shape) for name in VARIANTS]


def bound(step: Step, images: torch.Tensor) -> Any:
    return lambda: step(images)


# --- operations -------------------------------------------------------------------------------------------------------


def count_operations(work: Workload, name: str) -> int:
    """FLOPs of one step of a recipe."""
    with FakeTensorMode():
        networks, images = Networks(work), work.images()
        for optimizer in (networks.optimizer, networks.critic_optimizer):
            optimizer.step = _nothing  # counts for nothing, and would take most of the time
        step = RECIPES[name](networks)
        with Cost() as cost:
            step(images)
    return int(cost.flops)


def _nothing(closure: object = None) -> None:
    """An update of weights that have no content."""


def ideal_operations(work: Workload) -> int:
    """FLOPs of what no recipe can leave out."""
    with FakeTensorMode():
        networks, images = Networks(work), work.images()
        with Cost() as autoencoder:
            pixels, kl = networks.forward(images)
            (pixels.mean() + kl).backward()
        fake = pixels.detach().requires_grad_()
        with Cost() as perceptual:
            torch.autograd.grad(networks.lpips(fake, images), fake)
        networks.critic.requires_grad_(False)
        with Cost() as generator:
            torch.autograd.grad(networks.critic(fake).mean(), fake)
        networks.critic.requires_grad_(True)
        with Cost() as discriminator:
            networks.critic(torch.cat([images, fake.detach()])).mean().backward()
    return sum(cost.flops for cost in (autoencoder, perceptual, generator, discriminator))


def _operations(work: Workload) -> list[dict[str, Any]]:
    names = ("train_step", *REFERENCES, *VARIANTS)
    counts = {name: count_operations(work, name) for name in Progress(names, desc="operations", leave=False)}
    counts["ideal"] = ideal_operations(work)
    return counted("train_step_flops", counts, "GFLOP", 1e9)


def counted(figure: str, counts: dict[str, int], unit: str, scale: float) -> list[dict[str, Any]]:
    """Ours beside each other count; a ratio above 1 means that ours is smaller."""
    own = counts["train_step"]
    rows = []
    for name, count in counts.items():
        ratio = count / own
        rows.append(
            {"name": figure, "value": own / scale, "unit": unit, "of": count / scale}
            | {"ratio": {"to": name, "median": ratio, "min": ratio, "max": ratio}}
        )
    return rows[1:]


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(work: Workload) -> list[dict[str, Any]]:
    resident, held = {}, {}
    for name in Progress(("train_step", *REFERENCES, *VARIANTS), desc="memory", leave=False):
        # a process of its own, so that no recipe finds memory that another left
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            resident[name], held[name] = pool.apply(_grown, (work, name))
    rows = counted("train_step_memory", resident, "GB", 1e9)
    return [*rows, *counted("train_step_memory_counted", held, "GB", 1e9)]


def _grown(work: Workload, name: str) -> tuple[int, int]:
    """(growth of the resident memory, most bytes of tensors) of four updates of a recipe, its networks included."""
    images = work.images()
    with PeakMemory() as resident:
        with Cost() as cost:
            step = RECIPES[name](Networks(work))
            step(images)
        counted = cost.peak_bytes
        for _ in range(3):
            step(images)
    return resident.bytes, counted
