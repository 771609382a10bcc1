"""`eval.speed gpu_encoder`: the encoder alone, 32 images at a time: plain under autocast, then changed as `gpu_fast`
changes the step, and what that does to the posterior's mean (`difference`: from fp32, over its size).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.kernels.group_norm import fuse_norms

from . import encode
from .fast import Begun, captured, measured_memory, rows
from .gpu import WORK, need_a_gpu, synchronised
from .recipes import (
    Workload,
)

ENCODED_BATCH = 32
ENCODERS: dict[str, tuple[str, ...]] = {
    "encoder": (),
    "encoder_half": ("half",),
    "encoder_fused_norm": ("fused_norm",),
    "encoder_fused_half": ("fused_norm", "half"),
    "encoder_benchmark": ("fused_norm", "half", "benchmark"),
    "encoder_graph": ("fused_norm", "half", "benchmark", "graph"),
}


def encoder(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    return encoders(WORK, ENCODED_BATCH, options.rounds)


def encoders(
    work: Workload, batch: int, rounds_: int, ways: Mapping[str, tuple[str, ...]] = ENCODERS
) -> list[dict[str, Any]]:
    pixels = replace(work, batch=batch).images()
    exact = _encoded(work, (), pixels, "no")[1]()
    found: dict[str, float] = {}

    def make(name: str, changes: tuple[str, ...]) -> Begun:
        with measured_memory() as memory:
            run, mean = _encoded(work, changes, pixels, work.precision)
        found[name] = float((mean() - exact).norm() / exact.norm())
        return Begun(run, memory())

    makers = {name: partial(make, name, changes) for name, changes in ways.items()}
    result = rows("gpu", makers, batch, rounds_)
    for one in result:
        one["difference"] = found.get(one["name"].removeprefix("gpu_"))
    return result


def _encoded(
    work: Workload, changes: tuple[str, ...], pixels: torch.Tensor, precision: str
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """(the encoder at work, the means that it last gave)."""
    vae = encode.network(work.widths, work.groups).to(work.device)
    dtype = {"bf16": torch.bfloat16, "no": torch.float32}[precision]
    if "fused_norm" in changes:
        vae.to(memory_format=torch.channels_last)
        fuse_norms(vae)
    if "half" in changes:
        vae.to(dtype)
    last: list[torch.Tensor] = [pixels]

    @torch.no_grad()
    def run() -> None:
        torch.backends.cudnn.benchmark = "benchmark" in changes
        with torch.autocast(work.device, dtype, enabled=dtype != torch.float32):
            last[0] = latents.encode(vae, pixels.to(dtype) if "half" in changes else pixels).mean
        torch.backends.cudnn.benchmark = False

    run()
    run()
    whole: Callable[[], None] = captured(run) if "graph" in changes else run
    whole()
    return synchronised(whole) if work.device == "cuda" else whole, lambda: last[0].float()
