"""Profile of the latent: information per channel, and power spectra before and behind it.

Of clips, spectra are of frames, and the mean over a clip's counts once; of sounds they are along time.

Legend: B batch, C channels, c latent channels, H W pixels, t h w latent positions; of sounds L samples, n positions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import gather

SEGMENT = 1024  # samples, or latent positions, of which the spectrum of a longer sound is a mean


def radial_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Power by spatial frequency: x [B, C, H, W] => [min(H, W) // 2 + 1], summed over images, averaged over channels.

    Entry k averages |FFT|^2 / (H W) over the ring of frequencies that round to k / min(H, W) cycles per sample; white
    noise of variance 1 gives 1 everywhere. The mean of each plane is taken out first: it is no texture.
    """
    height, width = x.shape[2:]
    x = x.double()
    x = x - x.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.fft2(x).abs().square().mean(dim=1).sum(dim=0) / (height * width)
    place = rings(height, width).to(x.device)
    bins = min(height, width) // 2 + 1
    # the corners of the square lie beyond the largest whole ring
    inside = place < bins
    sums = torch.zeros(bins, dtype=torch.float64, device=x.device).index_add_(0, place[inside], power[inside])
    means: torch.Tensor = sums / torch.bincount(place[inside], minlength=bins)
    return means


@cache
def rings(height: int, width: int) -> torch.Tensor:
    """The ring of each frequency of a 2-D FFT [H, W]: its distance from 0, rounded, in 1 / min(H, W) cycles."""
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :]
    found: torch.Tensor = ((rows**2 + columns**2).sqrt() * min(height, width)).round().long()
    return found


def spectrum_along_time(x: torch.Tensor) -> torch.Tensor:
    """Power by frequency: x [B, C, L] => [S // 2 + 1], S = min(L, SEGMENT), summed over sounds, averaged over channels.

    Entry k is of k / S cycles per sample; white noise of variance 1 gives 1. Welch's method: Hann windows of S samples
    that overlap by half, the mean of each taken out.
    """
    length = min(x.shape[2], SEGMENT)
    parts = x.double().unfold(2, length, max(1, length // 2))
    window = torch.hann_window(length, dtype=torch.float64, device=x.device)
    power = torch.fft.rfft((parts - parts.mean(dim=3, keepdim=True)) * window).abs().square()
    found: torch.Tensor = power.mean(dim=(1, 2)).sum(dim=0) / window.square().sum()
    return found


def spectrum(x: torch.Tensor) -> torch.Tensor:
    """Power by frequency of images, of the frames of clips, or of sounds."""
    return spectrum_along_time(x) if x.ndim == 3 else radial_spectrum(frames_of(x))


class Profile:
    """Sums over images of a few small vectors, for latents [c, h, w] of images of a size (R, R), or [c, n] of sounds of
    a size (L,)."""

    def __init__(self, latent_shape: tuple[int, ...], size: tuple[int, ...]) -> None:
        channels, *positions = latent_shape
        most = SEGMENT if len(size) == 1 else size[0]
        lengths = dict.fromkeys(("kl", "mean", "square", "noise"), channels)
        lengths |= {"latents": min(*positions, most) // 2 + 1}
        lengths |= dict.fromkeys(("original", "reconstruction"), min(size[0], most) // 2 + 1)
        self.images = 0
        # zeros of the right shape: a rank that gets no image still takes part in the collective
        self.sums = {name: torch.zeros(length, dtype=torch.float64) for name, length in lengths.items()}

    def update(self, moments: Moments, pair: Pair) -> None:
        """Moments [B, c, h, w], [B, c, t, h, w] or [B, c, n] and the pair decoded from them."""
        self.images += moments.mean.shape[0]
        seen, full = pair.on_white, 1.0 if moments.mean.ndim == 3 else 127.5
        latent_frames = moments.mean.shape[2:-2].numel()
        mean, variance = (values.double().flatten(2) for values in (moments.mean, moments.logvar.double().exp()))
        kl = moments.kl().double().flatten(2).sum(dim=(0, 2))
        values = {
            "kl": torch.full_like(kl, torch.nan) if moments.is_point else kl,
            "mean": mean.mean(dim=2).sum(dim=0),
            "square": mean.square().mean(dim=2).sum(dim=0),
            "noise": variance.mean(dim=2).sum(dim=0),
            "latents": spectrum(moments.mean) / latent_frames,
            "original": spectrum(seen.original[: pair.count] / full) / pair.frames,
            "reconstruction": spectrum(seen.reconstruction[: pair.count] / full) / pair.frames,
        }
        for name, value in values.items():
            self.sums[name] += value.cpu()

    def compute(self) -> dict[str, Any]:
        """Combine over all ranks: nats per image and channel (None where the encoder gives no variance), each channel's
        mean and deviation, the three spectra."""
        images = int(gather(torch.tensor(self.images)).sum())
        total = {name: gather(value).sum(dim=0) / images for name, value in self.sums.items()}
        # law of total variance: that of the means, and the mean of the posteriors'
        variance = (total["square"] - total["mean"].square()).clamp(min=0) + total["noise"]
        return {
            "kl_nats_per_image": None if total["kl"].isnan().any() else total["kl"].tolist(),
            "mean": total["mean"].tolist(),
            "std": variance.sqrt().tolist(),
            "noise_std": total["noise"].sqrt().tolist(),
            "spectrum": {name: total[name].tolist() for name in ("latents", "original", "reconstruction")},
        }
