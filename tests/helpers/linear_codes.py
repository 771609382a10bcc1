"""Pictures that no patch of is flat, the linear codes of them, and short trainings from these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.linear_code import LinearCode, PatchMoments

MODEL = {"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
LINEAR = {"init": "linear", "init_images": 9, "model": MODEL, "adversary": {"weight": 0.0}, "discriminator": None}


def pictures(count: int = 48, channels: int = 3, side: int = 32) -> torch.Tensor:
    """uint8 [count, channels, side, side] with the spectrum of photographs, 1 / frequency, so that no patch is flat."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.fft.rfft2(torch.randn(count, channels, side, side, generator=draw))
    frequency = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None] ** 2).sqrt().clamp_min(1 / side)
    smooth = torch.fft.irfft2(noise / frequency)
    return (128 + 50 * smooth / smooth.std()).clamp(0, 255).to(torch.uint8)


def code_of(images: torch.Tensor, factor: int, channels: int) -> LinearCode:
    moments = PatchMoments(factor, images.shape[1])
    moments.update(images)
    return moments.code(channels)


def in_pixels(images: torch.Tensor) -> torch.Tensor:
    return images.double() / 127.5 - 1


def train(vae: Any, images: torch.Tensor, updates: int, learning_rate: float) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), learning_rate)
    x = in_pixels(images).float()
    draw = torch.Generator().manual_seed(0)
    for _ in range(updates):
        optimizer.zero_grad()
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)
        loss = (vae.decode(z).sample - x).abs().mean() + 1e-6 * posterior.kl().mean()
        loss.backward()
        optimizer.step()


def first_loss(folder: Path) -> float:
    with (folder / "metrics.jsonl").open() as file:
        return float(json.loads(file.readline())["loss/l1"])
