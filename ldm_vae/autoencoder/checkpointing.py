"""Gradient checkpointing of any autoencoder: activations are computed again in the backward pass instead of kept.

A class of diffusers that has it right does it itself. Some have none (Wan, Qwen-Image, DC, RAE: diffusers issues 11071,
11105), and AutoencoderTiny's changes what is encoded (measured on 0.42.1: its encoder skips its scaling); for these the
blocks are wrapped here, and a block that keeps a cache between its calls, in an argument or in itself, finds it, when
it is called again, as it was (of diffusers' own, KVAEVideo's gives wrong gradients for clips and Magvit's raises).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.last_layer import KINDS


def enable_checkpointing(vae: Any) -> None:
    """Compute activations of `vae` again in its backward pass; nothing changes where no gradient is asked for."""
    if family_of(vae).checkpointing and getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()
        return
    for block in [*_blocks(vae)]:
        block.forward = partial(_checkpointed, block, block.forward)
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
    return sum(isinstance(part, KINDS) for part in network.modules())


def _weights(network: nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`forward`, its activations not kept. Lists and dicts among the arguments are caches, which it changes, and so are
    tensors that its modules hold as plain attributes: when it is called again, they are as they were at its first call.
    """
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    calls = [(arguments, options)]
    again, held = _copied([list(arguments), options]), _held(block)

    def run(*_tensors: torch.Tensor) -> Any:
        if calls:
            given, named = calls.pop()
            return forward(*given, **named)
        given, named = _copied(again)
        now = _held(block)
        _hold(held)
        try:
            return forward(*given, **named)
        finally:
            _hold(now)

    tensors = [one for one in arguments if torch.is_tensor(one)]
    return checkpoint(run, *tensors, use_reentrant=False)


def _copied(value: Any) -> Any:
    """Lists and dicts of their own, of the same tensors."""
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return {name: _copied(one) for name, one in value.items()} if isinstance(value, dict) else value


def _held(block: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Tensors, or the place of one, that modules hold as plain attributes."""
    parts = [(part, [*vars(part).items()]) for part in block.modules()]
    return [(part, {name: one for name, one in own if one is None or torch.is_tensor(one)}) for part, own in parts]


def _hold(held: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, values in held:
        vars(part).update(values)
