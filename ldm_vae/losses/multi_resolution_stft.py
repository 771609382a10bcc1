"""Multi-resolution STFT loss of Parallel WaveGAN (Yamamoto et al., ICASSP 2020, eqs. 4 to 7; in auraloss
MultiResolutionSTFTLoss): spectral convergence and log magnitude, of three windows.

Legend: B batch, C channels of a sound, L samples, S a magnitude spectrogram [C, F, T].
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.spectrogram import transform

FLOOR = 1e-8  # of a squared magnitude (auraloss): the root and the logarithm of silence have a gradient, which is 0
Sizes = Annotated[tuple[Annotated[int, Field(ge=2, le=2**20)], ...], Field(min_length=1)]


class MultiResolutionSTFT(nn.Module):
    """Mean over windows of |S(y) - S(x)|_F / |S(y)|_F + mean |log S(y) - log S(x)|, x pixels [B, C, L], y the target.

    The first is taken of each sound and averaged over them, as in the paper: auraloss takes it of a whole batch, which
    would make the objective depend on the micro-batch.
    """

    domain = "sounds"

    def __init__(self, sizes: Sizes, hops: Sizes, windows: Sizes) -> None:
        super().__init__()
        self.resolutions = [*zip(sizes, hops, windows, strict=True)]

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        terms = [self._term(pixels, target, *resolution) for resolution in self.resolutions]
        return torch.stack(terms).mean()

    def _term(self, pixels: torch.Tensor, target: torch.Tensor, size: int, hop: int, window: int) -> torch.Tensor:
        field = "losses.multi_resolution_stft"
        x, y = (_magnitudes(transform(sounds, size, hop, window, field)) for sounds in (pixels, target))
        error, norm = (torch.linalg.vector_norm(one, dim=(1, 2, 3)) for one in (y - x, y))
        convergence: torch.Tensor = (error / norm).mean()
        return convergence + (y.log() - x.log()).abs().mean()


def _magnitudes(spectrum: torch.Tensor) -> torch.Tensor:
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=FLOOR).sqrt()


class Config(TermConfig):
    """Spectral convergence and log magnitude of spectrograms of several windows, of sounds."""

    kind: Literal["multi_resolution_stft"] = "multi_resolution_stft"
    sizes: Sizes = (1024, 2048, 512)
    """Samples of each Fourier transform; windows are padded to it."""
    hops: Sizes = (120, 240, 50)
    """Samples between two frames."""
    windows: Sizes = (600, 1200, 240)
    """Samples of each Hann window; the published three are of 24 kHz."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not len(self.sizes) == len(self.hops) == len(self.windows):
            came = f"{len(self.sizes)}, {len(self.hops)} and {len(self.windows)}"
            raise ValueError(f"sizes, hops, windows: expected as many of each, got {came}")
        if odd := [pair for pair in zip(self.windows, self.sizes, strict=True) if pair[0] > pair[1]]:
            raise ValueError(f"windows: expected none above its size, got {odd[0][0]} in {odd[0][1]}")
        return self

    def build(self) -> MultiResolutionSTFT:
        return MultiResolutionSTFT(self.sizes, self.hops, self.windows)
