"""Capacity: the rate is held at C nats per image, and C rises (Burgess et al. 2018, eq. 8)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.micro_batches import LastUpdate
from ldm_vae.losses import TermConfig


class Capacity(nn.Module):
    """|KL - C(images seen)|, nats per pixel value. On which side of C the KL is, is decided by the last update's global
    batch (in the first update by each micro-batch's own): |mean| is not the mean of each part's own."""

    domain = "latents"
    needs = "posterior"

    def __init__(self, nats: float, images: int) -> None:
        super().__init__()
        self.nats = nats
        self.images = images
        self.rate = LastUpdate()

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        capacity = self.nats * min(1.0, reconstruction.images_seen / self.images)
        nats = reconstruction.moments.kl().sum() / len(reconstruction.images)
        side = torch.where(self.rate.see(nats) < capacity, -1.0, 1.0)
        return side * (nats - capacity) / reconstruction.images[0].numel()

    def after_update(self) -> None:
        self.rate.after_update()

    def leave_out(self) -> None:
        self.rate.leave_out()


class Config(TermConfig):
    """Rate held at a rising capacity."""

    kind: Literal["kl_capacity"] = "kl_capacity"
    weight: float = 1000.0
    """gamma: 1000 in the paper, beside a likelihood in nats."""
    nats: float = Field(25.0, ge=0)
    """The capacity at the end, nats per image."""
    images: int = Field(100_000, gt=0)
    """Images in which it rises from 0."""

    def build(self) -> Capacity:
        return Capacity(self.nats, self.images)
