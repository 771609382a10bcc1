"""`eval.speed checkpointing`: the memory of a backward pass with gradient checkpointing, beside the plain one.

- `checkpointing`: the growth of the resident memory of a process that has loaded a network, in one encode, decode and
  backward of one image, the gradients of all its weights included; `seconds` of both passes;
- `checkpointing_counted`: the most bytes that tensors hold in the same pass, free of the allocator and of what a
  convolution takes while it works; with `_clip`, of a clip instead of an image.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.families import family_of
from ldm_vae.core.flop_counter import Cost
from ldm_vae.core.progress import Progress

from .networks import NETWORKS, network
from .timing import PeakMemory

RESOLUTION = 256
FRAMES, CLIP_RESOLUTION = 9, 128  # of a clip, for the classes of clips


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json; `ratio` is the share of the plain pass's memory."""
    rows = []
    for name in Progress(NETWORKS, desc="checkpointing", leave=False):
        plain, spared = (_in_a_process(name, checkpointing) for checkpointing in (False, True))
        rows.append(_row("checkpointing", name, plain[0], spared[0]) | {"seconds": [plain[1], spared[1]]})
        rows.append(_row("checkpointing_counted", name, *(count(name, one) for one in (False, True))))
        if family_of(NETWORKS[name][0]).signal == "video":
            counted = (count(name, one, FRAMES) for one in (False, True))
            rows.append(_row("checkpointing_counted_clip", name, *counted) | {"resolution": CLIP_RESOLUTION})
    return rows


def _row(figure: str, name: str, plain: int, spared: int) -> dict[str, Any]:
    share = spared / plain
    return {
        "name": f"{figure}_{name}", "class": NETWORKS[name][0].__name__, "resolution": RESOLUTION,
        "value": spared / 1e6, "of": plain / 1e6, "unit": "MB",
        "ratio": {"to": "plain", "median": share, "min": share, "max": share},
    }  # fmt: skip


def count(name: str, checkpointing: bool, frames: int | None = None) -> int:
    """The most bytes that tensors hold in one pass above the network's weights, of an image or of a clip of so many
    frames, counted on tensors without content."""
    with FakeTensorMode():
        vae, pixels = _trainable(name, checkpointing)
        pixels = pixels if frames is None else torch.empty(1, 3, frames, CLIP_RESOLUTION, CLIP_RESOLUTION)
        with Cost() as cost:
            _backward(vae, pixels)
    return cost.peak_bytes


def _in_a_process(name: str, checkpointing: bool) -> tuple[int, float]:
    """(bytes, seconds) of one pass in a process of its own, which finds no memory that another pass left."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: tuple[int, float] = pool.apply(_measure, (name, checkpointing))
        return found


def _measure(name: str, checkpointing: bool) -> tuple[int, float]:
    vae, pixels = _trainable(name, checkpointing)
    with torch.no_grad():  # libraries load what they need at their first call
        latents.encode(vae, pixels[:, :, :64, :64])
    started = time.perf_counter()
    with PeakMemory() as memory:
        _backward(vae, pixels)
    return memory.bytes, time.perf_counter() - started


def _trainable(name: str, checkpointing: bool) -> tuple[Any, torch.Tensor]:
    vae = network(name).train().requires_grad_(True)
    if checkpointing:
        enable_checkpointing(vae)
    return vae, torch.rand(1, 3, RESOLUTION, RESOLUTION) * 2 - 1


def _backward(vae: Any, pixels: torch.Tensor) -> None:
    latents.decode(vae, latents.encode(vae, pixels).mean).square().mean().backward()
