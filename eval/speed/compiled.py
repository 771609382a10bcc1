"""`eval.speed compiled`: what torch.compile makes of the recipes.

- `train_step_flops_compiled`: operations of the compiled graphs of ours, beside `ideal` (see `eval.speed train`),
  `eager` (ours, not compiled), and published recipes, whose partial passes over a graph cost more when it is compiled;
- `train_step_compiled`: seconds of a step of a small network by torch.compile's default backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ldm_vae.core.flop_counter import Cost
from ldm_vae.core.progress import Progress

from .recipes import RECIPES, Networks, Workload
from .timing import interleave, row
from .train import (
    bound,
    count_operations,
    counted,
    ideal_operations,
)

COUNTED = Workload(batch=1, resolution=64)  # compiled graphs are run to be counted, so it is kept small
TIMED = Workload(batch=4, widths=(32, 64), resolution=64, net="alex", critic_width=32)
PARTITIONED = "aot_eager_decomp_partition"
DEFAULT = "inductor"


class CompiledCost(Cost):
    """Counts the operations of compiled graphs too: what is not compiled to machine code reaches it when it runs."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def count_compiled(work: Workload, name: str) -> int:
    """FLOPs of one step of a recipe as torch.compile cuts and rearranges it, executed operation by operation: the
    partitioner and decompositions of its default backend, which may compute activations again."""
    torch._dynamo.reset()
    step, images = RECIPES[name](Networks(replace(work, compiled=PARTITIONED))), work.images()
    step(images)
    with CompiledCost() as cost:
        step(images)
    return cost.flops


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    names = ("train_step", "latent_diffusion", "diffusers_repaired")
    counts = {name: count_compiled(COUNTED, name) for name in Progress(names, desc="compiled", leave=False)}
    counts |= {"ideal": ideal_operations(COUNTED), "eager": count_operations(COUNTED, "train_step")}
    torch._dynamo.reset()
    images = TIMED.images()
    steps = {
        f"{name}{suffix}": bound(RECIPES[name](Networks(replace(TIMED, compiled=backend))), images)
        for name in names[:2]
        for suffix, backend in (("", None), ("_compiled", DEFAULT))
    }
    steps["latent_diffusion_compiled"] = _keeping_graphs(steps["latent_diffusion_compiled"])
    times = interleave(steps, options.rounds, "compiled")
    rows = [row("train_step_compiled", times, "train_step_compiled", to) for to in steps if to != "train_step_compiled"]
    return [*counted("train_step_flops_compiled", counts, "GFLOP", 1e9), *rows]


def _keeping_graphs(step: Callable[[], object]) -> Callable[[], object]:
    """A compiled backward may write over what its graph holds, so torch refuses to run one twice, as latent-diffusion's
    adaptive weight does, unless it is told to compile for that."""

    def run() -> object:
        with torch._functorch.config.patch(donated_buffer=False):
            return step()

    return run
