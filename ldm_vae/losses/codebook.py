"""The codebook's own loss: rows move to the encoder's vectors (van den Oord et al., NeurIPS 2017, eq. 3, second term).
Not with `codebook: ema`, which moves them without a gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class Codebook(nn.Module):
    """mean (sg[vector] - row)^2 over batch, positions and channels: VQGAN's mean, so its weights carry over."""

    domain = "latents"
    needs = "codes"

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        assert reconstruction.codes is not None
        return (reconstruction.codes.before.detach() - reconstruction.codes.after).square().mean()


class Config(TermConfig):
    """Codebook rows towards the encoder."""

    kind: Literal["codebook"] = "codebook"

    def build(self) -> Codebook:
        return Codebook()
