"""Profile of the latent: information per channel, and power spectra before and behind it.

Of clips, spectra are of frames, and the mean over a clip's counts once.

Legend: B batch, C channels, c latent channels, H W pixels, t h w latent positions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import gather


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


class Profile:
    """Sums over images of a few small vectors, for latents [c, h, w] of square images of side `resolution`."""

    def __init__(self, latent_shape: tuple[int, ...], resolution: int) -> None:
        channels, height, width = latent_shape
        lengths = dict.fromkeys(("kl", "mean", "square", "noise"), channels)
        lengths |= {"latents": min(height, width) // 2 + 1}
        lengths |= dict.fromkeys(("original", "reconstruction"), resolution // 2 + 1)
        self.images = 0
        # zeros of the right shape: a rank that gets no image still takes part in the collective
        self.sums = {name: torch.zeros(length, dtype=torch.float64) for name, length in lengths.items()}

    def update(self, moments: Moments, pair: Pair) -> None:
        """Moments [B, c, h, w] or [B, c, t, h, w] and the pair decoded from them."""
        self.images += moments.mean.shape[0]
        seen, latent_frames = pair.on_white, moments.mean.shape[2:-2].numel()
        mean, variance = (values.double().flatten(2) for values in (moments.mean, moments.logvar.double().exp()))
        kl = moments.kl().double().flatten(2).sum(dim=(0, 2))
        values = {
            "kl": torch.full_like(kl, torch.nan) if moments.is_point else kl,
            "mean": mean.mean(dim=2).sum(dim=0),
            "square": mean.square().mean(dim=2).sum(dim=0),
            "noise": variance.mean(dim=2).sum(dim=0),
            "latents": radial_spectrum(frames_of(moments.mean)) / latent_frames,
            "original": radial_spectrum(seen.original[: pair.count] / 127.5) / pair.frames,
            "reconstruction": radial_spectrum(seen.reconstruction[: pair.count] / 127.5) / pair.frames,
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
