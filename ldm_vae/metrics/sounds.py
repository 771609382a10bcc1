"""Metrics of sounds: one number per sound, the mean over its channels, of samples as they are decoded.

    si_sdr                 dB, of the original scaled to fit best (Le Roux et al., ICASSP 2019, eq. 5)
    snr                    dB, |x|^2 / |x - y|^2
    log_spectral_distance  dB, mean over frames of the RMS over frequencies of 20 log10 |X| / |Y| (Gray & Markel 1976)
    mel_distance           as losses.multi_scale_mel has it, seven windows (Kumar et al. 2023)
    stoi                   intelligibility of speech, at most 1 (Taal et al. 2011), by pystoi
    pesq                   opinion score of speech, 1.04 to 4.64 (ITU-T P.862.2, wideband, at 16 kHz), by pesq

Decibels are held between -100 and 100, which stands for equal sounds; a silent original of a reconstruction that is not
silent has -100. Each sound is measured as far as it goes, without the silence that fills its excerpt. STOI and PESQ
leave out sounds in which they find no speech, the two distances those of at most half a window.

Legend: B batch, C channels of a sound, L samples.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ldm_vae.metrics.metric import Better, ImageMetric, Metric, Unmeasured
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.running import Summary
from ldm_vae.metrics.titles import OF_SOUNDS
from ldm_vae.perceptual.spectrogram import MEL_FLOOR, MelDistance, transform

NAMES = OF_SOUNDS
NEEDS = {
    "mel_distance": ("torchaudio",),
    "stoi": ("torchmetrics", "pystoi"),
    "pesq": ("torchmetrics", "torchaudio", "pesq"),
}
LIMIT = 100.0  # dB, so that no mean is infinite and JSON holds no inf
WINDOW = 2048  # samples, of the log-spectral distance; four overlap; and the longest of the mel distance
PESQ_RATE = 16_000  # Hz of wideband PESQ


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # two of [B, C, L] => [B]


class SoundMetric(ImageMetric):
    """One number per sound, averaged over sounds; NaN for one that has none, which is left out."""

    def __init__(self, name: str, better: Better, measure: Measure, shortest: int = 0) -> None:
        """shortest: samples that it needs."""
        super().__init__(name, better, self._of_pair)
        self._measure, self.shortest = measure, shortest

    def _of_pair(self, pair: Pair) -> torch.Tensor:
        """Values [n] of the sounds that are measured, one by one: each has its own length."""
        whole = [pair.raw_original.shape[2]] * len(pair.indices)
        each = zip(pair.raw_original, pair.raw_reconstruction, pair.lengths or whole, strict=False)
        found = [
            self._measure(x[None, :, :length], y[None, :, :length]).item() if length >= self.shortest else math.nan
            for x, y, length in each
        ]
        return torch.tensor(found, dtype=torch.float64)

    def update(self, pair: Pair) -> torch.Tensor:
        values = self._of_pair(pair)
        self.running.update(values[~values.isnan()])
        return values

    def compute(self) -> Summary:
        found = super().compute()
        return found if found.n else replace(found, note="no sound that it can measure")


def build(name: str, rate: int, samples: int) -> Metric:
    """Build one of NAMES, of excerpts of so many samples at `rate` Hz."""
    better: Better = "lower" if name.endswith("distance") else "higher"
    if any(importlib.util.find_spec(package) is None for package in NEEDS.get(name, ())):
        return Unmeasured(name, better, "not installed: pip install 'ldm-vae[audio,speech]'")
    shortest = WINDOW // 2 + 1 if name.endswith("distance") else 0  # a reflection at both ends takes half a window
    if samples < shortest:
        return Unmeasured(name, better, f"needs excerpts of {shortest:,} samples or more")
    measures: dict[str, Measure] = {
        "si_sdr": si_sdr,
        "snr": snr,
        "log_spectral_distance": log_spectral_distance,
        "stoi": lambda x, y: _by_channel(stoi, x, y, rate),
        "pesq": lambda x, y: _by_channel(pesq, x, y, rate),
    }
    if name == "mel_distance":
        mel = MelDistance(rate)
        measures[name] = lambda x, y: mel(x.double(), y.double(), name)
    return SoundMetric(name, better, measures[name], shortest)


def snr(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Sounds [B, C, L] => dB [B]."""
    x, y = original.double(), reconstruction.double()
    return _decibels(x, x - y)


def si_sdr(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Sounds [B, C, L] => dB [B], each channel's scale its own."""
    x, y = original.double(), reconstruction.double()
    energy = x.square().sum(dim=2, keepdim=True)
    target = (x * y).sum(dim=2, keepdim=True) / energy.where(energy > 0, 1.0) * x
    # nothing of the original in it: its distance from the original then, which is 0 between two silences
    error = torch.where(target.abs().amax(dim=2, keepdim=True) > 0, y - target, y - x)
    return _decibels(target, error)


def _decibels(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    signal, noise = (one.square().sum(dim=2) for one in (signal, noise))
    ratio = 10 * torch.log10(signal / noise)
    found: torch.Tensor = ratio.where(noise > 0, LIMIT).clamp(-LIMIT, LIMIT).mean(dim=1)
    return found


def log_spectral_distance(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Sounds [B, C, L] => dB [B], of magnitudes floored at 1e-5."""
    field = "log_spectral_distance"
    x, y = (
        transform(one.double(), WINDOW, WINDOW // 4, WINDOW, field).abs().clamp(min=MEL_FLOOR)
        for one in (original, reconstruction)
    )
    return (20 * (x / y).log10()).square().mean(dim=2).sqrt().mean(dim=(1, 2))


def stoi(original: torch.Tensor, reconstruction: torch.Tensor, rate: int) -> float:
    """STOI of one channel [L]; NaN where there is too little speech."""
    from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # pystoi warns, and gives 1e-5
            return float(short_time_objective_intelligibility(reconstruction, original, rate))
    except RuntimeWarning:
        return math.nan


def pesq(original: torch.Tensor, reconstruction: torch.Tensor, rate: int) -> float:
    """Wideband PESQ of one channel [L]; NaN where it finds no speech."""
    from pesq import PesqError
    from torchaudio.functional import resample
    from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality

    x, y = (resample(one.float(), rate, PESQ_RATE) for one in (original, reconstruction))
    try:
        return float(perceptual_evaluation_speech_quality(y, x, PESQ_RATE, "wb"))
    except PesqError:
        return math.nan


def _by_channel(
    measure: Callable[[torch.Tensor, torch.Tensor, int], float], x: torch.Tensor, y: torch.Tensor, rate: int
) -> torch.Tensor:
    """Sounds [B, C, L] => the mean over channels [B]; NaN where one has none, as a silent one (pystoi says 0)."""
    pairs = zip(x.cpu().flatten(0, 1), y.cpu().flatten(0, 1), strict=True)
    found = [measure(one, other, rate) if one.any() else math.nan for one, other in pairs]
    return torch.tensor(found, dtype=torch.float64).view(x.shape[:2]).mean(dim=1)


def bits_per_second(rate: float, hop: int, sizes: Sequence[int]) -> float:
    """Bits per second of codes: one of each codebook, of so many rows, for each `hop` samples at `rate` Hz."""
    return rate / hop * sum(math.log2(size) for size in sizes)
