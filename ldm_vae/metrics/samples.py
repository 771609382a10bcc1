"""Decoded random latents: the page's samples.

    samples/normal-0.png ...    z from N(0, I), the prior of the evidence bound
    samples/field-0.png ...     z from a Gaussian field with the measured mean, deviation and spectrum of the latents

An autoencoder for latent diffusion is no generator: at a KL weight of 1e-6 its latents are far from N(0, I), so the
first are noise, and what the second still lack is what a diffusion model has to learn.

Legend: B batch, c latent channels, t h w latent positions.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import latent_size
from ldm_vae.core import rng
from ldm_vae.core.pictures import save
from ldm_vae.data.alpha import visible
from ldm_vae.data.transforms import to_uint8
from ldm_vae.metrics.profile import rings

FOLDER = "samples"
COUNT = 6


@torch.no_grad()
def keep_samples(
    output: Path,
    vae: Any,
    found: dict[str, Any],
    resolution: int,
    device: torch.device,
    alpha: bool = False,
    frames: int | None = None,
) -> None:
    """Write output/samples, COUNT of each kind; `found` is what `Profile` measured, `vae` is on `device`; alpha: its
    images have it, and are shown over a checkerboard; frames: of clips."""
    size = (resolution, resolution) if frames is None else (frames, resolution, resolution)
    noise = rng.normal(0, "samples", range(COUNT), latent_size(vae, *size))
    folder = output / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for kind, z in (("normal", noise), ("field", field(noise, found))):
        for number, picture in enumerate(to_uint8(latents.decode(vae, z.to(device)))):
            picture = visible(picture.movedim(0, -3), alpha).movedim(-3, 0)  # channels come first, also of a clip
            save(picture[: 1 if len(picture) == 1 else 3].float(), folder / f"{kind}-{number}.png")


def field(noise: torch.Tensor, found: dict[str, Any]) -> torch.Tensor:
    """White noise [B, c, h, w] or [B, c, t, h, w] => a Gaussian field with the measured mean [c], std [c] and radial
    spectrum, of clips anew in each latent frame."""
    spectrum = torch.tensor(found["spectrum"]["latents"], dtype=torch.float64)
    power = spectrum[rings(*noise.shape[-2:]).clamp(max=len(spectrum) - 1)]
    if not power.any():  # one position has no spectrum
        power = torch.ones_like(power)
    coloured = torch.fft.ifft2(torch.fft.fft2(noise.double()) * power.sqrt()).real / power.mean().sqrt()
    ones = (1,) * (noise.ndim - 2)
    mean, std = (torch.tensor(found[name], dtype=torch.float64).view(-1, *ones) for name in ("mean", "std"))
    made: torch.Tensor = coloured * std + mean
    return made.float()
