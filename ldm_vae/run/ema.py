"""Exponential moving average of the weights, in fp32, its half-life counted in images.

diffusers' EMAModel counts steps, so its meaning changes with the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ldm_vae.core.frozen_module import Frozen, without_graphs

LARGEST_SHARE = 0.05  # half-life at most 5 % of the images seen: early averages must forget the random start (EDM2)


class Ema:
    """Average of the weights of a network or objective: `module` is a frozen copy that holds it, and is validated and
    exported. Frozen parts, which never train, are shared with the original."""

    def __init__(self, module: nn.Module, halflife_images: int) -> None:
        shared: dict[int, Any] = {id(part): part for part in module.modules() if isinstance(part, Frozen)}
        without_graphs(module)
        self.module = copy.deepcopy(module, shared).float().eval().requires_grad_(False)
        self.halflife_images = halflife_images

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_images: int, copied: Collection[str] = ()) -> None:
        """Move the average after an update at `images_seen` (this batch included), by as much as `batch_images` count.

        copied: parameters that are taken over as they are, such as a codebook that is an average already, whose dead
        rows jump.
        """
        halflife = min(self.halflife_images, LARGEST_SHARE * images_seen)
        keep = 0.5 ** (batch_images / halflife) if halflife > 0 else 0.0
        values = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
        averages: dict[str, torch.Tensor] = dict(self.module.named_parameters())
        moving = [name for name in averages if name not in copied]
        if moving:  # most objectives own nothing
            torch._foreach_lerp_([averages[name] for name in moving], [values[name] for name in moving], 1.0 - keep)
        for name in copied:
            averages[name].copy_(values[name])
        for average, value in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(state)
