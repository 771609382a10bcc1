"""Stay near a teacher's latents: for a fine-tune whose diffusion model must stay usable, and to distil a tiny encoder.

Legend: c latent channels, h w latent positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.teacher import Teacher, teacher


class Drift(nn.Module):
    """Mean squared difference of the two posterior means, as a diffusion model sees them: normalised as the teacher's
    config.json says, so 1 is the variance of the latents. The target needs no graph."""

    domain = "latents"

    def __init__(self, source: str, ours: str, loaded: Teacher | None) -> None:
        """loaded: None leaves the teacher's cost out of a count."""
        super().__init__()
        self.source = source
        self.teacher = loaded
        self.ours = ours

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        mean = reconstruction.moments.mean
        if self.teacher is None:
            return mean.square().mean()
        theirs: torch.Tensor = self.teacher(reconstruction.images, normalised=True)
        if mean.shape != theirs.shape:
            raise UsageError(
                f"losses.drift: expected latents of the teacher's shape {tuple(theirs.shape[1:])}, "
                f"got {tuple(mean.shape[1:])} ({self.source})"
            )
        ours = self.teacher.normalise(mean) if self.ours == "raw" else mean
        difference: torch.Tensor = ours - theirs
        return difference.square().mean()


class Config(TermConfig):
    """Difference from a teacher's latents."""

    kind: Literal["drift"] = "drift"
    teacher: str
    """A VAE: a diffusers folder, a hub id, a single file or a run."""
    latents: Literal["raw", "normalised"] = "raw"
    """Latents of the trained network: raw latents as the teacher's encoder, or (AutoencoderTiny) normalised ones."""

    def build(self) -> Drift:
        return Drift(self.teacher, self.latents, teacher(self.teacher))

    def outline(self) -> Drift:
        return Drift(self.teacher, self.latents, None)
