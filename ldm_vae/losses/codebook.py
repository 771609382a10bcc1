"""The codebook's own loss: rows move to the encoder's vectors (van den Oord et al., NeurIPS 2017, eq. 3, second term).
Not with `codebook: ema`, which moves them without a gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class Codebook(nn.Module):
    """mean (sg[vector] - row)^2 over batch, positions and channels: VQGAN's mean, so its weights carry over. Of
    residual levels their sum."""

    domain = "latents"
    needs = "codes"

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        codes = reconstruction.codes
        assert codes is not None
        return codes.levels * (codes.before.detach() - codes.after).square().mean()


class Config(TermConfig):
    """Codebook rows towards the encoder."""

    kind: Literal["codebook"] = "codebook"

    def build(self) -> Codebook:
        return Codebook()
