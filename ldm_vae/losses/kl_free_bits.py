"""Free bits: the rate of a channel counts only above a floor, so that no channel gains by collapsing
(Kingma et al., NeurIPS 2016, eq. 15).

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.micro_batches import LastUpdate
from ldm_vae.losses import TermConfig


class FreeBits(nn.Module):
    """sum over groups of max(floor, KL of the group), the KL averaged over the batch; nats per pixel value.

    Which groups are above the floor is decided by the last update's global batch (in the first update by each
    micro-batch's own, as in the paper): the gradient is then the same however an update is divided.
    """

    domain = "latents"
    needs = "posterior"

    def __init__(self, bits: float, per: str) -> None:
        super().__init__()
        self.floor = bits * math.log(2)
        self.per = per
        self.rates = LastUpdate()

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        kl = reconstruction.moments.kl().mean(dim=0)  # [c, h, w] nats
        groups = kl.sum(dim=(1, 2)) if self.per == "channel" else kl
        above = self.rates.see(groups) > self.floor
        nats = torch.where(above, groups, torch.full_like(groups, self.floor)).sum()
        return nats / reconstruction.images[0].numel()

    def after_update(self) -> None:
        self.rates.after_update()

    def leave_out(self) -> None:
        self.rates.leave_out()


class Config(TermConfig):
    """Rate above a floor."""

    kind: Literal["kl_free_bits"] = "kl_free_bits"
    weight: float = 1.0
    """beta."""
    bits: float = Field(0.5, ge=0)
    """The floor of a group, in bits per image."""
    per: Literal["channel", "dimension"] = "channel"
    """channel: one floor for all positions of a channel together; dimension: one for each latent element."""

    def build(self) -> FreeBits:
        return FreeBits(self.bits, self.per)
