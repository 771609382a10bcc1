"""A discriminator of images with two heads that gives its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm_vae.discriminators import Discriminator
from ldm_vae.discriminators.patchgan import Config as PatchGAN


class TwoHeads(Discriminator):
    """Of images: PatchGANs of two sizes, which give their features."""

    gives_features = True

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(PatchGAN(width=8, layers=layers).build() for layers in (1, 2))
        self.train()

    def forward(self, images: torch.Tensor, features: bool = False) -> Any:
        maps = [head.network[:2](images) for head in self.heads]
        logits = [head(images) for head in self.heads]
        return (logits, maps) if features else logits
