"""The decoder's last layer with weights: where the adaptive weight compares gradients (Esser et al. 2021, eq. 7).

It is found by a decode without values, and what passes through it in training is kept by hooks. Where it gives the
decoded image itself, in one call, its input is all that is needed; elsewhere (a call for each chunk, an unpatchify or a
clamp behind it) its outputs are, whose cotangents the short graph from there to the pixels gives.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import some_latents
from ldm_vae.autoencoder.meta import on_meta, once, without_values
from ldm_vae.autoencoder.signals import injects_noise
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Place:
    """Name of the last layer in its network; is_output: what it gives is the decoded image."""

    name: str
    is_output: bool


@dataclass(frozen=True)
class Call:
    """One call of the last layer: its arguments, detached; what it gave, with its graph, where that is not the decoded
    image."""

    arguments: tuple[Any, ...]
    output: torch.Tensor | None


class Watch:
    """Keeps the calls of a network's last layer until they are taken."""

    def __init__(self, vae: nn.Module) -> None:
        place = place_of(vae)
        self.layer = vae.get_submodule(place.name)
        self._calls: list[Call] = []
        if place.is_output:  # before it: a compiled graph need not give its output twice
            self.layer.register_forward_pre_hook(lambda _, arguments: self._keep(arguments, None))
        else:
            self.layer.register_forward_hook(lambda _, arguments, output: self._keep(arguments, output))

    def _keep(self, arguments: tuple[Any, ...], output: torch.Tensor | None) -> None:
        self._calls.append(Call(tuple(one.detach() if torch.is_tensor(one) else one for one in arguments), output))

    def take(self) -> tuple[Call, ...]:
        """The calls since it was last asked."""
        calls, self._calls = tuple(self._calls), []
        return calls


def place_of(vae: Any) -> Place:
    """Find the last layer by a decode without values.

    Raises:
        UsageError: its decoder draws noise: it is no function of z that a cotangent goes back through.
    """
    if family_of(vae).noise or injects_noise(vae):
        raise UsageError(f"model: {an(type(vae).__name__)} decodes by sampling, which this training has no gradient of")
    return _trace(vae)


@once
@torch.no_grad()
def _trace(vae: Any) -> Place:
    calls: list[tuple[str, Any]] = []
    with on_meta():
        empty = without_values(vae)
        for name, module in empty.named_modules():
            if isinstance(module, KINDS):
                module.register_forward_hook(lambda _module, _inputs, output, name=name: calls.append((name, output)))
        decoded = latents.decode(empty, torch.empty(some_latents(vae).shape))
    name, output = calls[-1]
    # of clips it may be called once for one frame, and once more for each later chunk
    once = family_of(vae).signal == "image" and [called for called, _ in calls].count(name) == 1
    return Place(name, once and output is decoded and _is_plain(vae.get_submodule(name)))


def _is_plain(layer: nn.Module) -> bool:
    """True for a convolution whose weight's gradient follows from its input by one more convolution."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and set(layer.dilation) == {1} == {layer.groups}
