"""Measure the speed of a part beside what it competes with, in one run on one machine.

    python -m eval.speed data --output runs/speed
    python -m eval.speed quality --output runs/quality --minutes 2     # LPIPS and PSNR of each recipe, at equal minutes
    python -m eval.speed all --output runs/speed --rounds 3            # everything; an hour or two on two cores

Contenders take turns (A B C, A B C, ...), the ratio is taken within each round. DIR/speed.json then holds the machine
and one row for each figure, DIR/speed.png shows them; `ratio.median` above 1 means that the row's name is faster than
`ratio.to`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser

from . import (
    checkpointing,
    codec,
    compiled,
    data,
    denoisers,
    encode,
    encoders,
    fast,
    gpu,
    grow,
    plot,
    quality,
    rae,
    read,
    roofline,
    start,
    store,
    train,
    variants,
    video,
)
from .timing import machine

# name => (one line of help, what it runs); each lives in a file of its own
BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], list[dict[str, Any]]]]] = {
    "train": (
        "one generator and one discriminator update: seconds, operations and memory, beside published recipes",
        train.run,
    ),
    "gpu": (
        "the same on one CUDA device, at Stable Diffusion's width and 256 px, in bfloat16",
        gpu.training,
    ),
    "gpu_compiled": (
        "the same by torch.compile",
        gpu.compiled,
    ),
    "gpu_encode": (
        "photographs into a latent store there, beside the encoder alone",
        gpu.encoding,
    ),
    "gpu_fast": (
        "our step there as it is and made faster, one thing after the other",
        fast.training,
    ),
    "gpu_regions": (
        "the same with torch.compile of its blocks",
        fast.regions,
    ),
    "gpu_batch": (
        "both at batch 1 to 32",
        fast.batches,
    ),
    "gpu_encoder": (
        "the encoder alone, as it is and made faster",
        encoders.encoder,
    ),
    "gpu_denoiser": (
        "a step of the diffusion trainer",
        denoisers.denoiser,
    ),
    "roofline": (
        "where the time of a step goes by kind of operation, beside what the device could do at best",
        roofline.run,
    ),
    "variants": (
        "our step with one thing changed: precision and size of LPIPS, optimisers, memory formats, averages",
        variants.run,
    ),
    "compiled": (
        "operations and seconds of our step and of published ones under torch.compile",
        compiled.run,
    ),
    "quality": (
        "the same minutes for our step and for published recipes: LPIPS and PSNR on held-out photographs",
        quality.run,
    ),
    "rae": (
        "operations of one update of an AutoencoderRAE's decoder, beside diffusers' train_autoencoder_rae.py",
        rae.run,
    ),
    "encode": (
        "a folder of photographs into a store, beside the encoder alone and beside the usual script",
        encode.run,
    ),
    "read": (
        "random batches of latents from a store, beside memory and other readers",
        read.run,
    ),
    "data": (
        "images decoded, cropped and batched per core, beside a plain datasets + DataLoader pipeline",
        data.run,
    ),
    "video": (
        "clips decoded, cropped and batched per core, beside bare PyAV and a plain loop",
        video.run,
    ),
    "codec": (
        "the causal streaming codec on one core, in whole and hop by hop, beside the time that its sounds last",
        codec.run,
    ),
    "grow": (
        "a training step as resolution, batch and processes grow: seconds and memory",
        grow.run,
    ),
    "checkpointing": (
        "the memory of a backward pass of the newer classes with gradient checkpointing, beside the plain one",
        checkpointing.run,
    ),
    "store": (
        "a latent store as it grows: reading, opening, writing, and its books",
        store.run,
    ),
    "start": (
        "from launch to `ldm-vae --help` and to the first update of the smoke config",
        start.run,
    ),
}


def main() -> None:
    options = arguments()
    plot.pyplot()  # what is missing is said now and not after an hour
    options.output.mkdir(parents=True, exist_ok=True)
    place = options.output / "speed.json"
    results = []
    here = [name for name in BENCHMARKS if not name.startswith("gpu") or torch.cuda.is_available()]
    for name in here if options.what == "all" else [options.what]:
        results += BENCHMARKS[name][1](options)
        place.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n", encoding="utf-8")
    plot.draw(results, place.with_suffix(".png"))
    print(table(results))
    print(f"\n{place}, {place.with_suffix('.png')}")


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.speed", description=__doc__)
    known = "; ".join(f"{name}: {text}" for name, (text, _) in BENCHMARKS.items())
    parser.add_argument("what", choices=[*BENCHMARKS, "all"], metavar="WHAT", help=f"{known}; all: every one")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where speed.json goes")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender (7)")
    parser.add_argument("--minutes", type=float, default=2.0, help="quality: of one core, for each recipe (2)")
    parser.add_argument("--seeds", type=int, default=1, help="quality: repetitions, from other weights (1)")
    parser.add_argument("--remote", action="store_true", help="read: from an S3 server on this machine")
    found = parser.parse_args()
    if found.remote and found.what != "read":
        raise UsageError(f"--remote: expected with read, got {found.what}")
    for name, least in (("rounds", 1), ("seeds", 1)):
        if getattr(found, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(found, name)}")
    if not found.minutes > 0:
        raise UsageError(f"minutes: expected more than 0, got {found.minutes:g}")
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a person reads them."""
    names = [f"{found['name']} {found['at']:,}" if "at" in found else found["name"] for found in results]
    width = max(28, *(len(name) + 1 for name in names)) if names else 28
    lines = [f"{'':{width}}{'median':>10}   ratio (min to max)"]
    for name, found in zip(names, results, strict=True):
        if "failed" in found:
            lines.append(f"{name:{width}} failed: {found['failed']}")
            continue
        ratio = found.get("ratio")
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) x {ratio['to']}" if ratio else ""
        rate = f"   {found['images_per_s']:.4g} images/s" if "images_per_s" in found else ""
        rate += f"   {found['frames_per_s']:.4g} frames/s" if "frames_per_s" in found else ""
        rate += f"   {found['memory_mb']} MB" if "memory_mb" in found else ""
        rate += f"   {found['psnr']:.2f} dB" if "psnr" in found else ""
        rate += f"   differs by {found['difference']:.2g}" if found.get("difference") is not None else ""
        rate += f"   MFU {found['mfu']:.0%}" if found.get("mfu") is not None else ""
        if "attained" in found:
            rate += (
                f"{found['flop'] / 1e12:9.3f} TFLOP {found['bytes'] / 1e9:9.3f} GB   at best {found['floor_s']:.3g} s"
            )
            rate += f"   attained {found['attained']:.0%}"
        figure = f"{found['median_s']:9.4g} s" if "median_s" in found else f"{found['value']:9.4g} {found['unit']}"
        lines.append(f"{name:{width}}{figure:14} {shown}{rate}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
