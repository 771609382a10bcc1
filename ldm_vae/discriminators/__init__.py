"""Discriminators, one file each; the file name is the name in a config."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized


class Discriminator(nn.Module):
    """A network whose spectral norms move once per update.

    domain: "pixels" for images [B, C, H, W], among them the frames of clips, or "clips" for clips [B, C, T, H, W].
    """

    domain = "pixels"

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
