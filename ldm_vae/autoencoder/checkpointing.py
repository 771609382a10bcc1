"""Gradient checkpointing of any autoencoder: activations are computed again in the backward pass instead of kept.

A class of diffusers that has it right does it itself. Some have none (Wan, Qwen-Image, DC, RAE: diffusers issues 11071,
11105), and AutoencoderTiny's changes what is encoded (measured on 0.42.1: its encoder skips its scaling); for these the
blocks are wrapped here, and a block that keeps a cache between its calls finds it, when it is called again, as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_vae.autoencoder.families import family_of


def enable_checkpointing(vae: Any) -> None:
    """Compute activations of `vae` again in its backward pass; nothing changes where no gradient is asked for."""
    if family_of(vae).checkpointing and getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()
        return
    for block in [*_blocks(vae)]:
        block.forward = partial(_checkpointed, block.forward)
    vae.gradient_checkpointing = True  # as diffusers marks a network that does it


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Residual and attention blocks: the members of lists of layers that hold several layers with weights. A member
    whose own members hold most of its weights is a stage: its blocks are meant."""
    listed = isinstance(network, nn.ModuleList | nn.Sequential)
    for one in network.children():
        inside = [*_blocks(one)]
        stage = isinstance(one, nn.ModuleList | nn.Sequential) or 2 * sum(map(_weights, inside)) > _weights(one)
        if listed and not stage and _layers(one) > 1:
            yield one
        else:
            yield from inside


def _layers(network: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear) for part in network.modules())


def _weights(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`forward`, its activations not kept. Lists among the arguments are caches, which it changes: when it is called
    again, they are as they were at its first call."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    calls = [(arguments, options)]
    again = tuple(map(_copied, arguments)), {name: _copied(value) for name, value in options.items()}

    def run(*_tensors: torch.Tensor) -> Any:
        if calls:
            given, named = calls.pop()
        else:
            given, named = tuple(map(_copied, again[0])), {name: _copied(value) for name, value in again[1].items()}
        return forward(*given, **named)

    tensors = [one for one in arguments if torch.is_tensor(one)]
    return checkpoint(run, *tensors, use_reentrant=False)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
