"""Lengths of clips and sounds that come back whole from their classes, and the latent frames or positions of each.

Most classes cut what is over, some pad, some fail: other lengths are refused. Legend: T frames, t latent frames, L
samples, n latent positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import signals
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.meta import on_meta, once, shared_without_values
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.core.validation import first_line

SIDE = 256  # of the frames that are tried
LONG = 17  # frames, whole for every class whose lengths are 1 + t k with a t of 1, 2, 4, 8 or 16
# samples, a multiple of every hop whose prime factors are of audio: 2048, 4096, 800, 960, 1920, 882, 2205
MANY = 2**12 * 3**2 * 5**2 * 7**2


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
        empty = shared_without_values(vae)

        def latent_frames(frames: int) -> int:
            failed: Exception | None = None
            for channels in signals.channels_to_try(vae):
                try:
                    pixels = torch.empty(1, channels, frames, SIDE, SIDE)
                    found = signals.held_by(signals.encoded(empty, pixels))
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


@dataclass(frozen=True)
class Hop:
    """Of a class of sounds: channels C of a sound, and the samples of a latent position."""

    channels: int
    samples: int


@once
@torch.no_grad()
def hop_of(vae: Any) -> Hop:
    """Channels and hop of a class of sounds, by encodes and decodes without values of two lengths.

    Raises:
        UsageError: it encodes no sound, or decodes to another length than it encodes.
    """
    with on_meta():
        empty = shared_without_values(vae)
        failed: Exception | None = None
        for channels in signals.channels_to_try(vae):
            try:
                positions, lengths = [], []
                for samples in (MANY, 2 * MANY):
                    found = signals.held_by(signals.encoded(empty, torch.empty(1, channels, samples)))
                    z = found if torch.is_tensor(found) else found.mode()
                    positions.append(z.shape[-1])
                    lengths.append(signals.leave(empty, empty.decode(z), None).shape[-1])
            except Exception as error:  # of another number of channels, or of another signal: any kind
                failed = failed or error
                continue
            name, hop = an(type(vae).__name__), MANY / (positions[1] - positions[0])
            if lengths != [MANY, 2 * MANY] or positions[0] * hop != MANY:
                raise UsageError(
                    f"VAE: {name} decodes {positions[0]:,} latent positions of {MANY:,} samples to {lengths[0]:,}; "
                    "expected strides, each of which its decoder takes back whole (an Oobleck's are even)"
                )
            return Hop(channels, int(hop))
    assert failed is not None
    raise UsageError(f"VAE: {an(type(vae).__name__)} encodes no sound [B, C, L]: {first_line(failed)}")


def check_samples(vae: Any, samples: int, field: str = "L") -> None:
    """Raises UsageError, which calls the number `field`, unless sounds of so many samples come back whole: a class cuts
    what is over a multiple of its hop, or pads it, or fails."""
    hop = hop_of(vae).samples
    if samples <= 0 or samples % hop:
        near = max(1, round(samples / hop)) * hop
        raise UsageError(
            f"{field}: expected a positive multiple of {hop} samples, the hop of {an(type(vae).__name__)}, got "
            f"{samples}; {near} would do"
        )


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
