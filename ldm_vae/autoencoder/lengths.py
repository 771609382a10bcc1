"""Lengths of clips that come back whole from a class of clips, and the latent frames of each.

Most classes cut what is over, some pad, some fail: other lengths are refused. Legend: T frames, t latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import signals
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.meta import on_meta, once, without_values
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an

SIDE = 256  # of the frames that are tried
LONG = 17  # frames, whole for every class whose lengths are 1 + t k with a t of 1, 2, 4, 8 or 16


@dataclass(frozen=True)
class Lengths:
    """Clips of first + k step frames have latent_first + k latent_step latent frames, k = 0, 1, ...; a step of 0: only
    k = 0."""

    first: int
    step: int
    latent_first: int
    latent_step: int

    def latent_frames(self, frames: int) -> int:
        """t of a length that is one of these."""
        return self.latent_first + (frames - self.first) // max(1, self.step) * self.latent_step

    @property
    def joined(self) -> int | None:
        """t, the frames of a latent frame, where 1 + t k frames have 1 + k latent frames or a multiple of k."""
        if self.first != 1 or self.latent_first != 1:
            return None
        return self.step // self.latent_step if self.step else 1

    @property
    def law(self) -> str:
        """The lengths in words."""
        if self.step == 0:
            return str(self.first)
        return f"{self.first} + {self.step} k" if self.step > 1 else f"{self.first} or more"


@once
@torch.no_grad()
def lengths_of(vae: Any) -> Lengths:
    """The lengths of a class of clips, its t by encodes without values; any length of a class of images."""
    family = family_of(vae)
    if signals.is_by_frame(vae):
        return Lengths(1, 1, 1, 1)
    with on_meta():
        empty = without_values(vae)

        def latent_frames(frames: int) -> int:
            failed: Exception | None = None
            for channels in signals.channels_to_try(vae):
                try:
                    pixels = torch.empty(1, channels, frames, SIDE, SIDE)
                    found = signals.held_by(empty.encode(signals.enter(empty, pixels)))
                    return int((found if torch.is_tensor(found) else found.mode()).shape[2])
                except (RuntimeError, ValueError) as error:  # of another number of channels
                    failed = failed or error
            assert failed is not None
            raise failed

        first, step = latent_frames(family.first), family.step
        if step == 0:
            return Lengths(family.first, 0, first, 0)
        if step is None:  # t
            step = (LONG - 1) // (latent_frames(LONG) - first)
        return Lengths(family.first, step, first, latent_frames(family.first + step) - first)


def check_frames(vae: Any, frames: int, field: str = "T") -> None:
    """Raises UsageError, which calls the number `field`, unless a clip of so many frames comes back whole."""
    if frames == 1 == family_of(vae).first:
        return
    lengths = lengths_of(vae)
    _check(field, type(vae).__name__, frames, lengths.first, lengths.step, lengths.law, "frames")


def check_latent_frames(vae: Any, frames: int) -> None:
    """Raises UsageError unless so many latent frames are those of a clip."""
    if frames == 1 == family_of(vae).first:
        return
    lengths = lengths_of(vae)
    latent = Lengths(lengths.latent_first, lengths.latent_step, 0, 0)
    _check("t", type(vae).__name__, frames, latent.first, latent.step, latent.law, "latent frames")


def frames_of(vae: Any, latent_frames: int) -> int:
    """T of a clip of t latent frames. Raises UsageError for a t that no clip has."""
    check_latent_frames(vae, latent_frames)
    lengths = lengths_of(vae)
    return lengths.first + (latent_frames - lengths.latent_first) // max(1, lengths.latent_step) * lengths.step


def _check(field: str, name: str, found: int, first: int, step: int, law: str, what: str) -> None:
    over = found - first
    if found == first or (step and over >= 0 and over % step == 0):
        return
    below = first + max(0, over) // step * step if step else first
    near = str(below) if not step or over < 0 else f"{below} or {below + step}"
    raise UsageError(f"{field}: expected {law} {what} for {an(name)}, got {found}; {near} would do")
