"""Decode a teacher's latents instead of our own: how a tiny decoder is distilled (TAESD), while `losses/drift.py`
brings the tiny encoder to the same latents."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ldm_vae.core.errors import UsageError
from ldm_vae.perceptual.teacher import Teacher, teacher
from ldm_vae.perturbations import Draw, PerturbationConfig


class TeacherLatents(nn.Module):
    """The teacher's latents of the same images, normalised as a diffusion model sees them; no gradient to our encoder
    from the image."""

    def __init__(self, source: str, loaded: Teacher | None) -> None:
        """loaded: None leaves the teacher's cost out of a count."""
        super().__init__()
        self.source = source
        self.teacher = loaded

    def noise_channels(self, latent_channels: int) -> int:
        return 0

    def forward(self, latents: torch.Tensor, target: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        if self.teacher is None:
            return latents.detach(), target
        theirs: torch.Tensor = self.teacher(draw.images, normalised=True)
        if theirs.shape != latents.shape:
            raise UsageError(
                f"perturbations.teacher_latents: expected latents of the teacher's shape {tuple(theirs.shape[1:])}, "
                f"got {tuple(latents.shape[1:])} ({self.source})"
            )
        return theirs, target


class Config(PerturbationConfig):
    """The decoder learns from a teacher's latents."""

    kind: Literal["teacher_latents"] = "teacher_latents"
    teacher: str
    """A VAE: a diffusers folder, a hub id, a single file or a run."""

    def build(self, seed: int) -> TeacherLatents:
        return TeacherLatents(self.teacher, teacher(self.teacher))

    def outline(self, seed: int) -> TeacherLatents:
        return TeacherLatents(self.teacher, None)
