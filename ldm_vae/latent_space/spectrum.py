"""Power spectrum of latents over spatial frequencies, of sounds along time.

A diffusion model denoises coarse structure first, and an image's power falls with frequency. Latents that hold much
power at high frequencies are closer to noise, and learning them is harder (Skorokhodov et al., "Improving the
diffusability of autoencoders", ICML 2025).

Of clips, figures are means over latent frames. Legend: B batch, c latent channels, t h w latent positions, n of sounds.
"""

from __future__ import annotations

import torch

from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.metrics.profile import radial_spectrum, spectrum_along_time

HIGH = 0.25  # cycles per position: half of the highest frequency that a row of positions can hold


def radial_power_spectrum(latents: torch.Tensor) -> torch.Tensor:
    """latents [B, c, h, w] or [B, c, t, h, w] => mean power over images and channels, fp64 [min(h, w) // 2 + 1]; of
    sounds [B, c, n] see `spectrum_along_time`.

    Entry k is the ring of k / min(h, w) cycles per position; white noise of variance 1 gives 1 in each. Entry 0 is 0:
    the mean of each plane is taken out.
    """
    if latents.ndim == 3:
        return spectrum_along_time(latents) / len(latents)
    frames = frames_of(latents)
    return radial_spectrum(frames) / len(frames)


def high_frequency_share(latents: torch.Tensor) -> torch.Tensor:
    """latents [B, c, h, w], [B, c, t, h, w] or [B, c, n] => the share of each one's power above HIGH, fp64 [B], 0 to
    1.

    Over all channels, the mean of each plane left out; 0 where nothing is left. White noise has `white_share(h, w)`.
    """
    latents = latents[:, :, None] if latents.ndim == 3 else latents  # a row of positions
    height, width = latents.shape[-2:]
    count, latents = len(latents), frames_of(latents).double()
    power = torch.fft.fft2(latents - latents.mean(dim=(2, 3), keepdim=True)).abs().square().sum(dim=1)
    high = _is_high(height, width).to(power.device)
    share: torch.Tensor = power[:, high].sum(dim=1) / power.sum(dim=(1, 2)).clamp(min=1e-300)
    # what rounding leaves of a constant has a share too
    left = power.sum(dim=(1, 2)) > 1e-24 * height * width * latents.square().sum(dim=(1, 2, 3))
    return torch.where(left, share, 0.0).view(count, -1).mean(dim=1)


def white_share(height: int, width: int) -> float:
    """`high_frequency_share` of white noise: the share of all frequencies but 0 that lie above HIGH, near 0.8."""
    return float(_is_high(height, width).sum()) / max(1, height * width - 1)


def _is_high(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :]
    found: torch.Tensor = (rows**2 + columns**2).sqrt() > HIGH
    return found
