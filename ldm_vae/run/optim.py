"""Optimisers and the learning rate, counted in images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

from ldm_vae.core.config import Section
from ldm_vae.core.numbers import Momentum, NotNegative, Positive


class OptimizerConfig(Section):
    """Adam or AdamW, for the autoencoder and for the discriminator alike."""

    kind: Literal["adam", "adamw"] = "adam"
    """The optimiser, and with it the meaning of weight_decay: adamw shrinks the weights beside Adam's step (Loshchilov
    & Hutter, ICLR 2019), adam adds weight_decay * weight to the gradient, an L2 penalty, which Adam then divides by the
    gradient's own size. With weight_decay 0 the two are the same."""
    betas: tuple[Momentum, Momentum] = (0.5, 0.9)
    """latent-diffusion's, usual against an adversary; (0.9, 0.999) without one."""
    eps: Positive = 1e-12
    """Losses are means per pixel value, so gradients are smaller than latent-diffusion's by C * H * W: with the usual
    1e-8 Adam's step would no longer be free of the scale."""
    weight_decay: NotNegative = 0.0
    """adamw: each update takes learning_rate * weight_decay of every weight, biases and norms included. adam: added to
    the gradient, so it pulls hardest where gradients are small; losses are means per pixel value, beside which 1e-2 is
    large."""

    def build(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        make: Any = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        optimizer: torch.optim.Optimizer = make(
            parameters, lr=learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer


def trainable_parameters(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def schedule(images_seen: int, warmup_images: int, max_images: int, kind: Literal["constant", "cosine"]) -> float:
    """Factor of the learning rate: linear from 0 over warmup_images, then constant, or a half cosine down to 0."""
    warmup = min(1.0, images_seen / warmup_images) if warmup_images else 1.0
    if kind == "constant" or images_seen <= warmup_images:
        return warmup
    progress = min(1.0, (images_seen - warmup_images) / max(1, max_images - warmup_images))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate is a function of images seen alone, so it has no state to save."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
