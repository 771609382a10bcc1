"""`eval.speed variants`: our training step with one thing changed, beside the step as it is: seconds and operations.

The result stays (to rounding):
- `lpips_target_graph`: the target's features with a graph, as LPIPS is usually called;
- `adam_loop`, `adam_foreach`, `adam_fused`: torch's three ways to update the weights;
- `channels_last`: the memory format of every network and of the images;
- `ema_foreach`, `ema_loop`: the moving average of the weights too, in one call for all tensors or one by one.

The result changes:
- `lpips_bf16`: LPIPS under bfloat16 autocast;  `lpips_half`: on both images at half the resolution;  `lpips_crop`: on a
  quarter of the image, drawn anew each step;
- `critic_batch_norm`, `critic_frozen_statistics`: batch norm in the discriminator, as published, and with its running
  statistics in the place of the batch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm_vae.core.flop_counter import Cost
from ldm_vae.perceptual.lpips import LPIPS
from ldm_vae.run.ema import Ema

from .recipes import (
    Networks,
    Recipe,
    Step,
    Workload,
    ours,
)
from .timing import interleave, row

WORK = Workload(resolution=64, batch=1)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    images = WORK.images()
    steps = {name: _bound(recipe(Networks(work)), images) for name, (work, recipe) in variants(WORK).items()}
    times = interleave(steps, options.rounds, "variants")
    rows = [row(name, times, name, None if name == "step" else "step") for name in steps]
    for found, step in zip(rows, steps.values(), strict=True):
        with Cost() as cost:
            step()
        found["gflop"] = cost.flops / 1e9
    return rows


def _bound(step: Step, images: torch.Tensor) -> Callable[[], object]:
    return lambda: step(images)


def variants(work: Workload) -> dict[str, tuple[Workload, Recipe]]:
    batch_norm = replace(work, critic_norm="batch")
    return {
        "step": (work, ours),
        "lpips_target_graph": (work, _perceptual(TargetGraph)),
        "adam_loop": (work, _adam(foreach=False)),
        "adam_foreach": (work, _adam(foreach=True)),
        "adam_fused": (work, _adam(fused=True)),
        "channels_last": (work, channels_last),
        "ema_foreach": (work, ema_foreach),
        "ema_loop": (work, ema_loop),
        "lpips_bf16": (work, _perceptual(Bfloat16)),
        "lpips_half": (work, _perceptual(Half)),
        "lpips_crop": (work, _perceptual(Crop)),
        "critic_batch_norm": (batch_norm, ours),
        "critic_frozen_statistics": (batch_norm, frozen_statistics),
    }


# --- LPIPS ------------------------------------------------------------------------------------------------------------


class TargetGraph(LPIPS):
    def _images(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # a target that wants a gradient makes the trunk keep what its backward would need
        features = self._features(target.detach().requires_grad_())
        layers = self._layers(self._features(pixels), features)
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in layers]).sum(dim=0)


class Bfloat16(LPIPS):
    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            return self._images(pixels, target).float().mean()


class Half(LPIPS):
    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(F.avg_pool2d(pixels, 2), F.avg_pool2d(target, 2))


class Crop(LPIPS):
    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        height, width = (side // 2 for side in pixels.shape[2:])
        top, left = (int(torch.randint(room + 1, (), device="cpu")) for room in (height, width))
        part = (..., slice(top, top + height), slice(left, left + width))
        return super().forward(pixels[part], target[part])


def _perceptual(kind: type[LPIPS]) -> Recipe:
    def build(networks: Networks) -> Step:
        networks.lpips = kind(networks.lpips.network, networks.lpips.smallest)
        return ours(networks)

    return build


# --- the rest of the step ---------------------------------------------------------------------------------------------


def _adam(**how: bool) -> Recipe:
    def build(networks: Networks) -> Step:
        for optimizer in (networks.optimizer, networks.critic_optimizer):
            for group in optimizer.param_groups:
                group |= {"foreach": None, "fused": None} | how
        return ours(networks)

    return build


def channels_last(networks: Networks) -> Step:
    modules: list[nn.Module] = [networks.network, networks.critic, networks.lpips.network]
    for module in modules:
        module.to(memory_format=torch.channels_last)
    step = ours(networks)
    return lambda images: step(images.to(memory_format=torch.channels_last))


def ema_foreach(networks: Networks) -> Step:
    step, ema = ours(networks), Ema(networks.network.vae, 10_000)

    def run(images: torch.Tensor) -> None:
        step(images)
        ema.update(networks.network.vae, 100_000, len(images))

    return run


def ema_loop(networks: Networks) -> Step:
    step, ema = ours(networks), Ema(networks.network.vae, 10_000)

    def run(images: torch.Tensor) -> None:
        step(images)
        with torch.no_grad():
            for average, value in zip(ema.module.parameters(), networks.network.vae.parameters(), strict=True):
                average.lerp_(value, 1e-4)

    return run


def frozen_statistics(networks: Networks) -> Step:
    networks.critic.eval()
    return ours(networks)
