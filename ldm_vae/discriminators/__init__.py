"""Discriminators, one file each; the file name is the name in a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

Logits = torch.Tensor | Sequence[torch.Tensor]
"""Output of a discriminator: logits [B, ...], or those of each of its heads."""


def heads_of(logits: Logits) -> Sequence[torch.Tensor]:
    """The logits of each head."""
    return [logits] if isinstance(logits, torch.Tensor) else logits


def per_head(measure: Callable[..., torch.Tensor], *logits: Logits) -> torch.Tensor:
    """The mean over heads of a measure of one head's logits, so that each head counts alike, however many it gives."""
    return torch.stack([measure(*head) for head in zip(*map(heads_of, logits), strict=True)]).mean(dim=0)


class Discriminator(nn.Module):
    """A network whose spectral norms move once per update.

    domain: "pixels" for images [B, C, H, W], among them the frames of clips, "clips" for clips [B, C, T, H, W], or
    "sounds" for sounds [B, C, L].
    gives_features: `forward(images, features=True)` gives its logits and a list of feature maps.
    """

    domain = "pixels"
    gives_features = False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for layer in self._spectral():  # torch iterates in every forward, which an update may have several of
            layer.parametrizations["weight"].eval()
        return self

    @torch.no_grad()
    def after_update(self) -> None:
        """One power iteration of each spectral norm, for the weights that the update has left."""
        for layer in self._spectral():
            layer.parametrizations["weight"].train()
            _ = layer.weight
            layer.parametrizations["weight"].eval()

    def _spectral(self) -> list[Any]:
        return [layer for layer in self.modules() if is_parametrized(layer)]
