"""Multi-scale mel loss of Descript Audio Codec (Kumar et al., NeurIPS 2023, section 3.4): absolute error of log mel
spectrograms of seven windows, short ones for transients, long ones for pitch.

Legend: B batch, C channels of a sound, L samples.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.spectrogram import MEL_BANDS, MEL_WINDOWS, MelDistance

NAME = "losses.multi_scale_mel"


class MultiScaleMel(nn.Module):
    """Sum over windows of mean |log10 mel(pixels) - log10 mel(target)|, of sounds [B, C, L]."""

    domain = "sounds"

    def __init__(
        self, rate: int | None, windows: tuple[int, ...], bands: tuple[int, ...], outline: bool = False
    ) -> None:
        super().__init__()
        self.rate, self.shape = rate, (windows, bands, outline)
        self.distance = None if rate is None else MelDistance(rate, *self.shape)

    def attach(self, network: Any) -> None:
        """Take the rate of the model, where the config names none."""
        config = getattr(network.vae, "config", {})
        own: int | None = config.get("sampling_rate", config.get("sample_rate"))
        if own is None and self.rate is None:
            raise UsageError(f"{NAME}.sample_rate: is missing, and {type(network.vae).__name__} names none")
        if own is not None and self.rate not in (None, own):
            raise UsageError(f"{NAME}.sample_rate: expected {own}, that of the model, got {self.rate}")
        if self.rate is None and own is not None:
            self.rate, self.distance = own, MelDistance(own, *self.shape)

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.distance is None:
            raise UsageError(f"{NAME}.sample_rate: is missing; expected hertz, or a model that names them")
        return self.distance(pixels, target, NAME).mean()


class Config(TermConfig):
    """Absolute error of log mel spectrograms of several windows, of sounds."""

    kind: Literal["multi_scale_mel"] = "multi_scale_mel"
    weight: float = 15.0
    """As published, beside adversary.weight 1 without `adaptive`."""
    sample_rate: int | None = Field(None, gt=0, le=10**6)
    """Of the sounds in hertz; that of the model if null."""
    windows: tuple[int, ...] = Field(MEL_WINDOWS, min_length=1)
    """Samples of each window, even; frames are a quarter of it apart."""
    bands: tuple[int, ...] = Field(MEL_BANDS, min_length=1)
    """Mel bands of each window."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if len(self.windows) != len(self.bands):
            raise ValueError(f"bands: expected one for each of {len(self.windows)} windows, got {len(self.bands)}")
        for name, values, least in (("windows", self.windows, 8), ("bands", self.bands, 1)):
            if odd := [value for value in values if not least <= value <= 2**20 or (least > 1 and value % 4)]:
                raise ValueError(
                    f"{name}: expected {'multiples of 4' if least > 1 else 'numbers'} from {least} on, got {odd[0]}"
                )
        return self

    def build(self) -> MultiScaleMel:
        return MultiScaleMel(self.sample_rate, self.windows, self.bands)

    def outline(self) -> MultiScaleMel:
        return MultiScaleMel(self.sample_rate, self.windows, self.bands, outline=True)
