"""KL(q(z|x) || N(0, I)), the rate (Kingma & Welling 2014, appendix B; with weight beta, Higgins et al. 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.losses import TermConfig


class KL(nn.Module):
    """Nats per pixel value: summed over the latent, divided by the batch and by the image's C * H * W, so that
    latent-diffusion's weights (1e-6 on sums) carry over beside per-pixel means."""

    domain = "latents"
    needs = "posterior"

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        return reconstruction.moments.kl().sum() / reconstruction.images.numel()


class Config(TermConfig):
    """Rate in nats per pixel value; weight is beta, `schedule` anneals it."""

    kind: Literal["kl"] = "kl"
    weight: float = 1e-6
    """beta: 1e-6 for latent diffusion, 1 for the evidence lower bound, above 1 beta-VAE."""

    def build(self) -> KL:
        return KL()
