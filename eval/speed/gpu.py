"""`eval.speed gpu | gpu_compiled | gpu_encode`: one CUDA device, Stable Diffusion's width, 256 px, bfloat16.

- gpu: `gpu_train_step` beside each published recipe (recipes.py); `gpu_autoencoder_only` is the floor; ours with
  one thing changed (variants.py), from a latent store, and with the small-GPU profile;
- gpu_compiled: ours as torch.compile's default backend makes it, channels-last too;
- gpu_encode: a folder of photographs into a store with that encoder, beside `gpu_bare_encoder`, which finds its batches
  on the device.

`memory_mb` is the most that torch's allocator held for the first two steps of a recipe, its networks and optimisers
included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_vae.core.errors import UsageError
from ldm_vae.core.progress import Progress
from ldm_vae.data.source import open_source
from ldm_vae.latent_store.write.encoder import default_threads

from . import encode
from .data import write_photographs
from .recipes import (
    RECIPES,
    Networks,
    Recipe,
    Workload,
)
from .timing import interleave, row
from .train import REFERENCES, VARIANTS
from .variants import variants

WORK = Workload(widths=(128, 256, 512, 512), resolution=256, batch=8, device="cuda", precision="bf16")
CHANGED = ("channels_last", "lpips_bf16", "adam_fused")
ENCODED, ENCODED_BATCH = 4096, 32  # enough images that the start of the decoding processes does not count


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json. Raises UsageError without a CUDA device, as do the others."""
    need_a_gpu()
    changed = variants(WORK)
    contenders = {name: (WORK, RECIPES[name]) for name in ("train_step", *REFERENCES, *VARIANTS)}
    return _measured(contenders | {name: changed[name] for name in CHANGED}, REFERENCES, options.rounds)


def compiled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    # compiled graphs count against one limit for each class, however many of its networks there are
    torch._dynamo.config.recompile_limit = 64
    work = replace(WORK, compiled="inductor")
    ours, channels_last = RECIPES["train_step"], variants(WORK)["channels_last"][1]
    contenders = {"compiled": (work, ours), "eager": (WORK, ours)}
    contenders["compiled_channels_last"] = work, channels_last
    return _measured(contenders, ["eager"], options.rounds)


def synchronised(run: Callable[[], object]) -> Callable[[], None]:
    """A call that is over when the device's work is."""

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


# --- training ---------------------------------------------------------------------------------------------------------


def _measured(
    contenders: dict[str, tuple[Workload, Recipe]], references: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """The first contender beside each of the references, and every other one beside the first."""
    steps, memory = {}, {}
    for name, (work, recipe) in Progress(contenders.items(), desc="first steps", leave=False):
        steps[name], memory[name] = _begun(work, recipe)
    times = interleave(steps, rounds, "gpu")
    rows, first = [], next(iter(steps))
    for name in steps:
        more = {"images_per_s": WORK.batch / statistics.median(times[name]), "memory_mb": memory[name]}
        rows += [row(f"gpu_{name}", times, name, to, **more) for to in (references if name == first else [first])]
    return rows


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        raise UsageError("gpu: expected a CUDA device, this machine has none; `eval.speed train` measures on the CPU")


def _begun(work: Workload, recipe: Recipe) -> tuple[Callable[[], None], int]:
    """(a step that has compiled and allocated what it keeps, the most megabytes it held)."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    networks, images = Networks(work), work.images()
    step = recipe(networks)
    run = synchronised(lambda: step(images))
    run()
    run()
    return run, round((torch.cuda.max_memory_allocated() - before) / 1e6)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encoding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    vae = encode.network(WORK.widths).to(WORK.device)
    pixels = torch.rand(ENCODED_BATCH, 3, WORK.resolution, WORK.resolution, device=WORK.device) * 2 - 1

    @torch.no_grad()
    def bare() -> None:
        with torch.autocast(WORK.device, torch.bfloat16):
            for _ in range(ENCODED // ENCODED_BATCH):
                vae.encode(pixels)

    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photographs", encode.PHOTOGRAPHS, encode.SIZE)
        source = encode.Repeated(open_source(Path(folder) / "photographs"), ENCODED)
        how = {
            "resolution": WORK.resolution, "batch_size": ENCODED_BATCH, "device": WORK.device,
            "mixed_precision": WORK.precision, "num_workers": max(1, (os.cpu_count() or 1) - 2),
            "encode_threads": default_threads(1, torch.device(WORK.device)),
        }  # fmt: skip
        contenders = {
            "gpu_bare_encoder": synchronised(bare),
            "gpu_encode": lambda: encode.write(vae, source, Path(folder), **how),
        }
        times = interleave(contenders, min(options.rounds, 3), "gpu encode")
    rate = {name: {"images_per_s": ENCODED / statistics.median(values)} for name, values in times.items()}
    return [
        row("gpu_bare_encoder", times, "gpu_bare_encoder", None, **rate["gpu_bare_encoder"]),
        row("gpu_encode", times, "gpu_encode", "gpu_bare_encoder", **rate["gpu_encode"]),
    ]
