"""Align latents with the features of a frozen network (VF loss of VA-VAE, Yao & Wang, CVPR 2025, eqs. 3-7).

Two parts: each position's projected latent points where the feature does (marginal cosine similarity), and positions
are as like each other in the latent as in the features (marginal distance-matrix similarity).

Legend: B batch, c latent channels, h w latent positions, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.errors import UsageError
from ldm_vae.core.frozen_module import Frozen
from ldm_vae.core.numbers import Channels
from ldm_vae.data.alpha import three_channels
from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.features import spatial_network

POSITIONS = 256  # per image in the distance matrix, evenly spread: all of 32 x 32 would be a million pairs


class Alignment(nn.Module):
    """mean relu(1 - m1 - cos(z', f)) + mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2)."""

    domain = "latents"
    of_sounds = False

    def __init__(self, network: nn.Module, latent_channels: int, width: int, cosine: float, distance: float) -> None:
        super().__init__()
        self.features = Frozen(network)
        self.project = nn.Conv2d(latent_channels, width, 1, bias=False)
        self.cosine_margin = cosine
        self.distance_margin = distance

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        images, z = reconstruction.images, reconstruction.latents
        if z.shape[1] != self.project.in_channels:
            raise UsageError(
                f"losses.alignment.latent_channels: expected the model's {z.shape[1]}, got {self.project.in_channels}"
            )
        if images.ndim != 4:
            raise UsageError("losses.alignment: the features are of images, got clips; leave it out")
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                greys = (three_channels(reconstruction.seen(images).float()) + 1) * 127.5
                features = self.features.network(greys).to(z.dtype)
                features = F.interpolate(features, z.shape[2:], mode="bilinear", align_corners=False)
            cosine = F.cosine_similarity(self.project(z), features, dim=1)
            marginal = F.relu(1 - self.cosine_margin - cosine).mean()
            ours, theirs = _similarities(z), _similarities(features)
            return marginal + F.relu((ours - theirs).abs() - self.distance_margin).mean()


def _similarities(x: torch.Tensor) -> torch.Tensor:
    """x [B, D, h, w] => cosine similarities between at most POSITIONS positions of each image [B, n, n]."""
    rows = x.flatten(2)
    rows = rows[:, :, torch.linspace(0, rows.shape[2] - 1, min(POSITIONS, rows.shape[2])).round().long()]
    rows = F.normalize(rows, dim=1)
    return rows.transpose(1, 2) @ rows


class Config(TermConfig):
    """Cosine alignment with frozen features."""

    kind: Literal["alignment"] = "alignment"
    weight: float = 0.1
    """The paper's 0.1 is on top of an adaptive weight; this one is fixed."""
    features: str = "efflite0"
    """A DINOv2 (a transformers folder or hub id), or efflite0: EfficientNet-Lite0 of the extra `features`."""
    latent_channels: Channels = 4
    """The model's, for the projection."""
    cosine_margin: float = Field(0.5, ge=0)
    """m1: likeness beyond 1 - m1 is not asked for."""
    distance_margin: float = Field(0.25, ge=0)
    """m2: differences of likeness below it are free."""

    def build(self) -> Alignment:
        return self._around(*spatial_network(self.features))

    def outline(self) -> Alignment:
        # counted as if it were EfficientNet-Lite0, which needs no file
        return self._around(*spatial_network(None))

    def _around(self, network: nn.Module, width: int) -> Alignment:
        return Alignment(network, self.latent_channels, width, self.cosine_margin, self.distance_margin)
