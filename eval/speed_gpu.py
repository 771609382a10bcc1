"""`eval.speed gpu`: the training step where it is meant to run, on one CUDA device, at Stable Diffusion's width, 256 px
and bfloat16: seconds, images per second and memory.

- `gpu_train_step`, beside each published recipe (eval/recipes.py); `gpu_autoencoder_only` is the floor;
- `gpu_<variant>`: ours with one thing changed (eval/speed_variants.py), compiled, from a latent store, and with the
  small-GPU profile;
- `gpu_encode`: a folder of photographs into a store with that encoder, beside `gpu_bare_encoder`, which finds its
  batches on the device.

`memory_mb` is the most that torch's allocator held for the first two steps of a recipe, its networks and optimisers
included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ldm_vae.data.source import open_source
from ldm_vae.errors import UsageError
from ldm_vae.latent_store.encoding import default_threads

from . import speed_encode
from .recipes import RECIPES, Networks, Recipe, Work
from .speed_data import write_photographs
from .speed_train import REFERENCES, VARIANTS
from .speed_variants import variants
from .timing import interleave, row

WORK = Work(widths=(128, 256, 512, 512), resolution=256, batch=8, device="cuda", precision="bf16")
CHANGED = ("channels_last", "lpips_bf16", "adam_fused")
ENCODED, ENCODED_BATCH = 8192, 32  # enough images that the start of the decoding processes does not count


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json. Raises UsageError without a CUDA device."""
    if WORK.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("gpu: expected a CUDA device, this machine has none; `eval.speed train` measures on the CPU")
    return [*_training(WORK, options.rounds), *_encoding(WORK, options.rounds)]


def synchronised(run: Callable[[], object]) -> Callable[[], None]:
    """A call that is over when the device's work is."""

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


# --- training ---------------------------------------------------------------------------------------------------------


def _training(work: Work, rounds: int) -> list[dict[str, Any]]:
    # compiled graphs count against one limit for each class, however many of its networks there are
    torch._dynamo.config.recompile_limit = 64
    steps, memory = {}, {}
    for name, (changed, recipe) in tqdm(_contenders(work).items(), desc="first steps", disable=None, leave=False):
        steps[name], memory[name] = _begun(changed, recipe)
    times = interleave(steps, rounds, "gpu")
    rows = []
    for name in steps:
        more = {"images_per_s": work.batch / statistics.median(times[name]), "memory_mb": memory[name]}
        others = [to for to in REFERENCES if name == "train_step"] or ["train_step"]
        rows += [row(f"gpu_{name}", times, name, to, **more) for to in others]
    return rows


def _contenders(work: Work) -> dict[str, tuple[Work, Recipe]]:
    found = {name: (work, RECIPES[name]) for name in ("train_step", *REFERENCES, *VARIANTS)}
    changed = variants(work)
    found |= {name: changed[name] for name in CHANGED}
    compiled = replace(work, compiled="inductor")
    found["compiled"] = compiled, RECIPES["train_step"]
    return found | {"compiled_channels_last": (compiled, changed["channels_last"][1])}


def _begun(work: Work, recipe: Recipe) -> tuple[Callable[[], None], int]:
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


def _encoding(work: Work, rounds: int) -> list[dict[str, Any]]:
    vae = speed_encode.network(work.widths).to(work.device)
    pixels = torch.rand(ENCODED_BATCH, 3, work.resolution, work.resolution, device=work.device) * 2 - 1

    @torch.no_grad()
    def bare() -> None:
        with torch.autocast(work.device, torch.bfloat16):
            for _ in range(ENCODED // ENCODED_BATCH):
                vae.encode(pixels)

    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photographs", speed_encode.PHOTOGRAPHS, speed_encode.SIZE)
        source = speed_encode.Repeated(open_source(Path(folder) / "photographs"), ENCODED)
        how = {
            "resolution": work.resolution, "batch_size": ENCODED_BATCH, "device": work.device,
            "mixed_precision": work.precision, "num_workers": max(1, (os.cpu_count() or 1) - 2),
            "encode_threads": default_threads(1, torch.device(work.device)),
        }  # fmt: skip
        contenders = {
            "gpu_bare_encoder": synchronised(bare),
            "gpu_encode": lambda: speed_encode.write(vae, source, Path(folder), **how),
        }
        times = interleave(contenders, min(rounds, 3), "gpu encode")
    rate = {name: {"images_per_s": ENCODED / statistics.median(values)} for name, values in times.items()}
    return [
        row("gpu_bare_encoder", times, "gpu_bare_encoder", None, **rate["gpu_bare_encoder"]),
        row("gpu_encode", times, "gpu_encode", "gpu_bare_encoder", **rate["gpu_encode"]),
    ]
