"""Discriminator of sounds: multi-period heads (HiFi-GAN, Kong et al., NeurIPS 2020, section 2.3) and multi-scale STFT
heads on complex spectrograms (EnCodec, Défossez et al. 2022, section 3.4), in bands, as Descript Audio Codec has both
(Kumar et al., NeurIPS 2023, section 3.3).

Legend: B batch, C channels of a sound, L samples, P samples of a period, F frequencies, T frames.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.core.numbers import Channels
from ldm_vae.discriminators import Discriminator
from ldm_vae.perceptual.spectrogram import transform

BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the frequencies, each judged by convolutions of its own
SMALLEST_PEAK = 1e-3  # that a sound is scaled by: published is 1e-9, which gives near-silence a gradient of 1e9
Maps = list[torch.Tensor]


class Config(Part):
    """Discriminator of sounds: multi-period and multi-scale STFT heads."""

    kind: Literal["waveform"] = "waveform"
    periods: tuple[Annotated[int, Field(ge=2, le=1024)], ...] = (2, 3, 5, 7, 11)
    """Of a multi-period head each: it sees every so manieth sample. Empty: none of those."""
    windows: tuple[Annotated[int, Field(ge=64, le=2**16, multiple_of=4)], ...] = (2048, 1024, 512)
    """Samples of the window of a multi-scale STFT head each. Empty: none of those."""
    period_width: Channels = 32
    """Channels of the first layer of a multi-period head; the last has 32 times as many."""
    stft_width: Channels = 32
    """Channels of every layer of an STFT head."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not self.periods + self.windows:
            raise ValueError("periods, windows: expected at least one of either, got none")
        return self

    def build(self, in_channels: int = 1) -> Waveform:
        heads = [PeriodHead(in_channels, period, self.period_width) for period in self.periods]
        return Waveform(heads + [SpectralHead(in_channels, window, self.stft_width) for window in self.windows])


class Waveform(Discriminator):
    """sounds [B, C, L] => logits of each head, [B, 1, L / P', P] or [B, 1, T, F'], higher means more real; with
    `features` also the feature maps of all layers, for feature matching.

    Each sound is centred and scaled to a peak of 0.8 first, all its channels alike, as published: a logit says nothing
    of loudness. No statistics of a batch: sounds are judged one by one.
    """

    domain = "sounds"
    gives_features = True

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.train()

    def forward(self, sounds: torch.Tensor, features: bool = False) -> Maps | tuple[Maps, Maps]:
        if sounds.ndim != 3:
            raise UsageError(f"discriminator: waveform expected sounds [B, C, L], got {list(sounds.shape)}")
        centred = at_least_fp32(sounds) - at_least_fp32(sounds).mean(dim=2, keepdim=True)
        peaks = centred.abs().amax(dim=(1, 2), keepdim=True)
        level = 0.8 * centred / peaks.clamp(min=SMALLEST_PEAK)
        found = [head(level) for head in self.heads]
        logits = [at_least_fp32(maps[-1]) for maps in found]
        return (logits, [at_least_fp32(one) for maps in found for one in maps[:-1]]) if features else logits


class PeriodHead(nn.Module):
    """sounds [B, C, L] => feature maps [B, c, L', P], the logits last: convolutions over samples P apart."""

    def __init__(self, channels: int, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        widths = [channels, width, 4 * width, 16 * width, 32 * width, 32 * width]
        strides = [3, 3, 3, 3, 1]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), (2, 0)))
            for (before, after), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, sounds: torch.Tensor) -> Maps:
        missing = -sounds.shape[2] % self.period
        if sounds.shape[2] <= missing:
            raise UsageError(f"discriminator: expected sounds of {self.period} samples or more, got {sounds.shape[2]}")
        folded = F.pad(sounds, (0, missing), mode="reflect").unflatten(2, (-1, self.period))  # type: ignore[no-untyped-call]
        maps = _through(self.layers, folded)
        return [*maps, self.last(maps[-1])]


class SpectralHead(nn.Module):
    """sounds [B, C, L] => feature maps [B, c, T, F'] of each band, the logits of all of them last: convolutions over
    the real and imaginary parts of a complex spectrogram."""

    def __init__(self, channels: int, window: int, width: int) -> None:
        super().__init__()
        self.window = window
        edges = [int(share * (window // 2 + 1)) for share in BANDS]
        self.bands = [*pairwise(edges)]
        shapes = [((3, 9), 1), ((3, 9), 2), ((3, 9), 2), ((3, 9), 2), ((3, 3), 1)]
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                weight_norm(
                    nn.Conv2d(width if layer else 2 * channels, width, kernel, (1, stride), (1, kernel[1] // 2))
                )
                for layer, (kernel, stride) in enumerate(shapes)
            )
            for _ in self.bands
        )
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, sounds: torch.Tensor) -> Maps:
        spectrum = transform(sounds, self.window, self.window // 4, self.window, "discriminator")
        parts = torch.cat([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)  # [B, 2C, T, F]
        maps = [_through(stack, parts[..., slice(*band)]) for stack, band in zip(self.stacks, self.bands, strict=True)]
        whole = torch.cat([one[-1] for one in maps], dim=3)
        return [*(one for stack in maps for one in stack), self.last(whole)]


def _through(layers: Any, x: torch.Tensor) -> Maps:
    maps = []
    for layer in layers:
        x = F.leaky_relu(layer(x), 0.1)
        maps.append(x)
    return maps
