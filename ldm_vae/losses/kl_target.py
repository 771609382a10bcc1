"""A rate held at a target: beta is the output of a PI controller (after ControlVAE, Shao et al., ICML 2020).

ControlVAE adds its two terms to beta itself; useful betas span eight decades, so this controller acts on log beta, in
velocity form: the proportional term answers the change of the error, the integral term the error times the images seen.
The error is the logarithm of rate over target, so the gains have no unit of their own. It moves once per update, by the
rate over the whole of it; the update itself pays the beta that was found before.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.micro_batches import Pending
from ldm_vae.losses import TermConfig


class KLTarget(nn.Module):
    """beta * KL in nats per pixel value; beta rises while the rate is above the target and falls while it is below.

    Its state (log beta, the last error, images seen) is in the objective's state_dict, so a resumed run goes on.
    """

    domain = "latents"
    needs = "posterior"
    log_beta: torch.Tensor
    last_error: torch.Tensor
    last_images: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pending = Pending()
        self.images_seen = 0
        self.register_buffer("log_beta", torch.tensor(math.log(config.beta)))
        self.register_buffer("last_error", torch.tensor(float("nan")))
        self.register_buffer("last_images", torch.tensor(0, dtype=torch.int64))

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        moments, images = reconstruction.moments, reconstruction.images
        pixels = images[0, 0].numel()
        nats_per_image = moments.kl().sum() / len(images)
        if torch.is_grad_enabled():
            self.pending.add(nats_per_image / pixels)
            self.images_seen = reconstruction.images_seen
        return self.log_beta.exp() * nats_per_image / images[0].numel()

    def after_update(self) -> None:
        self._control(self.pending.mean(), self.images_seen)

    def leave_out(self) -> None:
        self.pending.clear()

    @torch.no_grad()
    def _control(self, rate: torch.Tensor, images_seen: int) -> None:
        config = self.config
        error = torch.log(rate.clamp_min(1e-12) / config.nats_per_pixel).clamp(-3.0, 3.0)  # a factor of 20 says enough
        change = torch.nan_to_num(error - self.last_error, nan=0.0)  # there is none before the first
        elapsed = images_seen - self.last_images
        step = config.proportional * change + error * elapsed / config.integral_images
        # clamping log beta itself leaves nothing to wind up
        self.log_beta.add_(step).clamp_(math.log(config.smallest), math.log(config.largest))
        self.last_error.copy_(error)
        self.last_images.fill_(images_seen)

    def figures(self) -> dict[str, torch.Tensor]:
        return {"beta": self.log_beta.exp()}


class Config(TermConfig):
    """Rate held at a target by a controller."""

    kind: Literal["kl_target"] = "kl_target"
    nats_per_pixel: float = Field(0.1, gt=0)
    """The rate to hold, per pixel (position, not value) of the image."""
    beta: float = Field(1e-4, gt=0)
    """beta to start from."""
    smallest: float = Field(1e-9, gt=0)
    """beta never falls below."""
    largest: float = Field(100.0, gt=0)
    """beta never rises above."""
    integral_images: int = Field(2_000, gt=0)
    """Images in which beta grows e-fold while the rate is e times too high."""
    proportional: float = Field(0.1, ge=0)
    """Answer to a change of log rate; damps the integral term."""

    def build(self) -> KLTarget:
        return KLTarget(self)
