"""Walks through the latent space: between two images, linear and spherical, and along one channel.

A straight line between two draws of a Gaussian in many dimensions passes nearer to the centre than any draw lies
(at half way |z| is smaller by the square root of 2); the arc keeps its distance (White, "Sampling generative networks",
2016). Where the latent is an image of its own, as in latent diffusion, both mostly fade one picture into the other.

Legend: c latent channels, h w latent positions (of clips t h w), F frames.
"""

from __future__ import annotations

import math

import torch

FRAMES = 9  # from one end to the other, both included
REACH = 3.0  # deviations that a traversal goes to either side


def linear(start: torch.Tensor, end: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """Walk from start [c, h, w] to end, both included, in even steps [F, c, h, w]."""
    t = _steps(start, frames)
    return (1 - t) * start + t * end


def spherical(start: torch.Tensor, end: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """Walk along the arc around the origin from start [c, h, w] to end: even steps of the angle [F, c, h, w].

    Of two latents of different length the length changes along; of two parallel ones it is the line.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm()).clamp(min=1e-12)
    angle = math.acos(float(cosine.clamp(-1, 1)))
    if math.sin(angle) < 1e-4:
        return linear(start, end, frames)
    t = _steps(start, frames)
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / math.sin(angle)


def traversal(z: torch.Tensor, channel: int, mean: float, std: float, frames: int = FRAMES) -> torch.Tensor:
    """Move one channel of z [c, h, w] over -REACH ... REACH of its deviations, the others as they are [F, c, h, w].

    A latent of one position gets the value itself, mean + k std; of many positions all are shifted by k std, so that
    the picture in them stays.
    """
    moved = z.expand(frames, *z.shape).clone()
    steps = std * torch.linspace(-REACH, REACH, frames, dtype=z.dtype, device=z.device)
    moved[:, channel] = (z[channel] if z[channel].numel() > 1 else mean) + steps.view(-1, *(1,) * (z.ndim - 1))
    return moved


def _steps(like: torch.Tensor, frames: int) -> torch.Tensor:
    return torch.linspace(0, 1, frames, dtype=like.dtype, device=like.device).view(-1, *(1,) * like.ndim)
