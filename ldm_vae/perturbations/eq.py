"""Equivariance by training (EQ-VAE, Kouzelis et al., ICML 2025, eq. 4): the latent is scaled and rotated, and decodes
to the image scaled and rotated likewise. Diffusion models learn such latents faster.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn

from ldm_vae.autoencoder.signals import clips_of, frames_of
from ldm_vae.core import rng
from ldm_vae.data.alpha import resampled
from ldm_vae.perturbations import Draw, PerturbationConfig


class Equivariance(nn.Module):
    """One transformation for the whole batch of all ranks, drawn by the images seen: a batch has one shape."""

    resizes = True

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed

    def noise_channels(self, latent_channels: int) -> int:
        return 0

    def forward(self, latents: torch.Tensor, target: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        scale, turns = self.transformation(draw.images_seen)
        factor = target.shape[-1] // latents.shape[-1]
        height, width = (max(1, round(scale * side)) for side in latents.shape[-2:])
        move = partial(moved, height=factor * height, width=factor * width, turns=turns)
        # invisible colour must not be mixed into what is seen
        moved_target = 2 * resampled((target + 1) / 2, move) - 1 if draw.alpha else move(target)
        return moved(latents, height, width, turns), moved_target

    def transformation(self, images_seen: int) -> tuple[float, int]:
        """(scale, quarter turns) of the batch that begins after so many images."""
        generator = rng.generator(self.seed, "eq", images_seen)
        if generator.random() >= self.config.probability:
            return 1.0, 0
        return float(generator.choice(self.config.scales)), int(generator.integers(4)) if self.config.rotate else 0


def moved(x: torch.Tensor, height: int, width: int, turns: int) -> torch.Tensor:
    """x [B, channels, rows, columns], images or latents => resized to height x width, then by so many quarter turns;
    of clips every frame."""
    if x.ndim == 5:
        return clips_of(moved(frames_of(x), height, width, turns), x.shape[2])
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return torch.rot90(x, turns, dims=(2, 3))


class Config(PerturbationConfig):
    """Scale and rotation of the latent, decoded against the image scaled and rotated."""

    kind: Literal["eq"] = "eq"
    probability: float = Field(0.5, ge=0, le=1)
    """Share of batches that are transformed at all."""
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """One of these, equally likely; LPIPS needs what is left of the image to be 16 (vgg) or 31 (alex) px."""
    rotate: bool = True
    """By 0, 90, 180 or 270 degrees, equally likely."""

    @field_validator("scales")
    @classmethod
    def _positive(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or min(scales) <= 0 or max(scales) > 1:
            raise ValueError("expected one or more numbers in (0, 1]")
        return scales

    def build(self, seed: int) -> Equivariance:
        return Equivariance(self, seed)
