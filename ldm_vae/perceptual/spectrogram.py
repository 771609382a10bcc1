"""Spectrograms of sounds, for losses, metrics and pictures: magnitudes of short-time Fourier transforms, and their mel
bands.

Legend: B batch, C channels of a sound, L samples, N samples of a window, F = N / 2 + 1 frequencies, T frames, M mel
bands.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core.errors import UsageError

MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)  # samples; Descript Audio Codec (Kumar et al. 2023), section 3.4
MEL_BANDS = (5, 10, 20, 40, 80, 160, 320)  # of each of them
ROWS, COLUMNS = 128, 384  # of a picture
DECIBELS = 90.0  # below a sine of full scale, which is 0 dB, that it shows
SECONDS = 0.04  # of its windows, as a power of two of samples
MEL_FLOOR = 1e-5  # of a magnitude before its logarithm is taken: five powers of ten below a full scale of 1


def transform(sounds: torch.Tensor, size: int, hop: int, window: int, field: str) -> torch.Tensor:
    """sounds [B, C, L] => complex [B, C, F, T], of at least single precision whatever the autocast: a Hann window of
    `window` samples in frames of `size`, every `hop` samples; both ends are reflected.

    Raises:
        UsageError: sounds without as many samples as a reflection takes; `field` opens the sentence.
    """
    if sounds.ndim != 3 or sounds.shape[-1] <= size // 2:
        came = tuple(sounds.shape)
        raise UsageError(f"{field}: expected sounds [B, C, L] of more than {size // 2} samples L, got {came}")
    flat = at_least_fp32(sounds).flatten(0, 1)
    shape = torch.hann_window(window, dtype=flat.dtype, device=flat.device)
    with torch.autocast(sounds.device.type, enabled=False):
        found = torch.stft(flat, size, hop, window, shape, return_complex=True)
    return found.view(*sounds.shape[:2], *found.shape[1:])


def mel_bands(rate: int, window: int, bands: int) -> torch.Tensor:
    """Weights [M, F] of the mel bands from 0 to rate / 2 Hz, of Slaney's scale and of area 1: librosa's."""
    try:
        from torchaudio.functional import melscale_fbanks  # only who measures sounds loads its package
    except ImportError as error:
        raise UsageError("sounds: mel spectrograms need torchaudio: pip install 'ldm-vae[audio]'") from error
    with warnings.catch_warnings():
        # of 320 bands in 1025 frequencies the lowest lie between two of them, in the published sizes too
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        weights: torch.Tensor = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, bands, rate, "slaney", "slaney")
    return weights.T


class MelDistance:
    """Mean absolute difference of log10 mel spectrograms of sounds, summed over windows, as Descript Audio Codec's
    MelSpectrogramLoss has it; the windows of a spectrogram overlap by three quarters."""

    def __init__(
        self,
        rate: int,
        windows: Sequence[int] = MEL_WINDOWS,
        bands: Sequence[int] = MEL_BANDS,
        outline: bool = False,
    ) -> None:
        """rate: of the sounds, in hertz; outline: bands without content, for counting the cost: torchaudio looks at the
        values that it makes, and there are none then."""
        # no buffers of a module: a term's are averaged and counted from the start, and its rate comes later
        self.bands = [
            (window, torch.zeros(count, window // 2 + 1) if outline else mel_bands(rate, window, count))
            for window, count in zip(windows, bands, strict=True)
        ]

    def __call__(self, one: torch.Tensor, other: torch.Tensor, field: str) -> torch.Tensor:
        """Two of [B, C, L] => [B]; `field` opens the sentence of an error."""

        def differences() -> Iterator[torch.Tensor]:
            for window, weights in self.bands:
                pair = (_log_mel(sounds, weights, window, field) for sounds in (one, other))
                yield torch.sub(*pair).abs().flatten(1).mean(dim=1)

        return torch.stack([*differences()]).sum(dim=0)


def _log_mel(sounds: torch.Tensor, weights: torch.Tensor, window: int, field: str) -> torch.Tensor:
    """sounds [B, C, L] => log10 of their magnitudes in mel bands [B, C, M, T], floored."""
    magnitudes = transform(sounds, window, window // 4, window, field).abs()
    with torch.autocast(sounds.device.type, enabled=False):
        return (weights.to(magnitudes) @ magnitudes).clamp(min=MEL_FLOOR).log10()


def mel(hertz: float) -> float:
    """Frequency => its place on the axis of a picture (O'Shaughnessy 1987)."""
    return 2595 * math.log10(1 + hertz / 700)


def picture(sound: torch.Tensor, rate: int) -> torch.Tensor:
    """A sound [C, L] => levels [ROWS, COLUMNS] from 0 (-DECIBELS and below) to 1 (0 dB: a sine of full scale).

    Frequencies go up to rate / 2, evenly spaced in mel, the strongest of each row; time to the right, power averaged
    over each column and over channels.
    """
    window = max(16, 2 ** round(math.log2(SECONDS * rate)))
    hop = max(1, min(window // 4, sound.shape[1] // COLUMNS))
    shape = torch.hann_window(window)
    found = torch.stft(sound.float().cpu(), window, hop, window, shape, pad_mode="constant", return_complex=True)
    power = F.adaptive_avg_pool1d((2 * found.abs() / shape.sum()).square().mean(dim=0), COLUMNS)  # [F, COLUMNS]
    places = torch.linspace(0, mel(rate / 2), ROWS + 1).double()
    bins = (700 * (10 ** (places / 2595) - 1) * window / rate).round().long().clamp(max=len(power) - 1).tolist()
    rows = [power[low : max(low + 1, high)].amax(dim=0) for low, high in itertools.pairwise(bins)]
    levels = 10 * torch.stack(rows[::-1]).clamp(min=1e-20).log10()
    return (1 + levels / DECIBELS).clamp(0, 1)
