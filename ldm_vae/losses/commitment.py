"""Commitment: the encoder's vectors stay near their codes (van den Oord et al., NeurIPS 2017, eq. 3, third term)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class Commitment(nn.Module):
    """mean (vector - sg[row])^2 over batch, positions and channels; of residual levels their sum."""

    domain = "latents"
    needs = "codes"

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        codes = reconstruction.codes
        assert codes is not None
        return codes.levels * (codes.before - codes.after.detach()).square().mean()


class Config(TermConfig):
    """Encoder towards the codebook."""

    kind: Literal["commitment"] = "commitment"
    weight: float = 0.25
    """beta of the paper."""

    def build(self) -> Commitment:
        return Commitment()
