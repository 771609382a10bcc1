"""KL(q(code|x) || uniform), the rate of a discrete VAE whose codes are drawn (Ramesh et al., ICML 2021, 2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig


class CodeKL(nn.Module):
    """log K - entropy of q, in nats per pixel value: summed over positions, divided by the batch and by C * H * W."""

    domain = "latents"
    needs = "codes"

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        codes = reconstruction.codes
        if codes is None or codes.kl is None:
            raise UsageError("losses.code_kl: expected model.quantizer.kind gumbel; the codes of vq are not drawn")
        return codes.kl.sum() / reconstruction.images.numel()


class Config(TermConfig):
    """Rate of drawn codes."""

    kind: Literal["code_kl"] = "code_kl"
    weight: float = 1.0
    """beta; the paper raises it to 6.6, with a schedule."""

    def build(self) -> CodeKL:
        return CodeKL()
