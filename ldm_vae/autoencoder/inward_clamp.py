"""Gradients through the clamp that ends the decode of some classes (Wan, Qwen-Image, those of sounds).

Where a network from random weights learns images with a dark ground, its decoder leaves [-1, 1] within some tens of
steps, and a clamp gives no gradient there. A tiny Wan on squares that move over black, 500 steps of Adam at 1e-3, had
every pixel at -1, a gradient of 0 and an L1 of 0.200 (two seeds). So in training what is outside gets the gradients
that lead inside, and none that lead on (as in K. Crowson's ClampWithGrad): 0.053 and 0.060 in the same runs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ldm_vae.autoencoder.families import family_of


class InwardClamp(torch.autograd.Function):
    """x => x clamped to [-1, 1]; outside, a gradient passes where its descent leads inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        inside: torch.Tensor = (x.abs() <= 1.0) | (x * gradient > 0.0)
        return gradient * inside


class Inwards(TorchFunctionMode):
    """Within it, a clamp to [-1, 1] is an InwardClamp."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        limits = {**dict(zip(("min", "max"), args[1:], strict=False)), **(kwargs or {})}
        if function in (torch.clamp, torch.Tensor.clamp) and limits == {"min": -1.0, "max": 1.0}:
            return InwardClamp.apply(args[0])
        return function(*args, **(kwargs or {}))


def inwards(vae: Any) -> contextlib.AbstractContextManager[Any]:
    """Around a decode in training."""
    return Inwards() if family_of(vae).clamps else contextlib.nullcontext()
