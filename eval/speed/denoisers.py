"""`eval.speed gpu_denoiser`: a step of the diffusion trainer, DiT-B/2 on latents of 4 x 32 x 32; `mfu`: counted
operations over time and what a matrix product reaches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.core.flop_counter import Cost
from ldm_vae.denoisers.dit import Config as DiTConfig
from ldm_vae.diffusion.flow import Denoiser
from ldm_vae.run.optim import OptimizerConfig

from .fast import Begun, rows, warmed_up
from .gpu import WORK, need_a_gpu
from .peaks import peaks
from .recipes import (
    Workload,
)

DENOISERS: dict[str, tuple[str, ...]] = {"step": (), "adam_fused": ("adam_fused",), "graph": ("adam_fused", "graph")}
LATENTS = 128  # to an update of the denoiser


def denoiser(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    peak = peaks(WORK.device).flops[torch.bfloat16]
    found = []
    for batch in (LATENTS, 2 * LATENTS):
        found += denoisers(WORK, DiTConfig(), batch, (4, 32, 32), peak, options.rounds)
        torch.cuda.empty_cache()
    return found


def denoisers(
    work: Workload,
    shape: DiTConfig,
    batch: int,
    size: tuple[int, int, int],
    peak: float,
    rounds_: int,
    ways: Mapping[str, tuple[str, ...]] = DENOISERS,
) -> list[dict[str, Any]]:
    def make(changes: tuple[str, ...]) -> Begun:
        return warmed_up(lambda: denoiser_step(work, shape, batch, size, changes), "graph" in changes, work.device)

    makers = {name: partial(make, changes) for name, changes in ways.items()}
    result = rows("gpu_denoiser", makers, batch, rounds_, at=batch, against="batch")
    with Cost() as cost:
        denoiser_step(work, shape, batch, size)()
    for one in result:
        one["mfu"] = cost.flops / one["median_s"] / peak if "median_s" in one else None
    return result


def denoiser_step(
    work: Workload, shape: DiTConfig, batch: int, size: tuple[int, int, int], changes: tuple[str, ...] = ()
) -> Callable[[], None]:
    """A step of train.diffusion on the device, but for the noise, which is keyed on the host."""
    torch.manual_seed(work.seed)
    network = Denoiser(shape.build(size[0], size[1:], classes=1000).to(work.device).train(), 1000)
    optimizer = OptimizerConfig(kind="adamw", betas=(0.9, 0.999), eps=1e-8).build(network.parameters(), 1e-4)
    for group in optimizer.param_groups:
        group |= {"foreach": None, "fused": True} if "adam_fused" in changes else {}
        group["capturable"] = "graph" in changes
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision=work.precision, device_placement=False)
    model = accelerator.prepare(network)
    clean, noise = torch.randn(2, batch, *size, device=work.device)
    times, labels = torch.rand(batch, device=work.device), torch.randint(1000, (batch,), device=work.device)
    t = times.view(-1, 1, 1, 1)

    def run() -> None:
        predicted = model((1 - t) * clean + t * noise, times, labels)
        loss = (predicted - (noise - clean)).square().mean()
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return run
