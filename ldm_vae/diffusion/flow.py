"""Flow matching on latents: the straight paths of rectified flow, the velocity that a network learns, and samplers.

    x_t = (1 - t) x + t e        from data x at t = 0 to noise e ~ N(0, I) at t = 1
    v   = dx_t / dt = e - x      what the network is asked for; its best answer is E[v | x_t]

Lipman et al., "Flow matching for generative modeling", ICLR 2023, section 4.1; Liu et al., "Flow straight and fast",
ICLR 2023. Times are logit-normal as in Esser et al., "Scaling rectified flow transformers", ICML 2024 (SD3), section
3.1. Signs and the scale of times (0 to 1000) are those of diffusers' FlowMatchEulerDiscreteScheduler.

Noise, times and dropped labels are keyed by a sample's position in the global stream, so that nothing depends on the
number of processes.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core import rng
from ldm_vae.core.config import Section

TIMESTEPS = 1000  # of diffusers' networks and schedulers: t = 1

# (noised [B, c, h, w], times [B] in 0..1, labels [B]) => velocity [B, c, h, w]
Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FlowConfig(Section):
    """Distribution of the training times on the paths. By default nothing here depends on the size of the latent."""

    time_mean: float = 0.0
    """Of the logit of t: above 0 the network sees more noise."""
    time_std: float = Field(1.0, gt=0)
    """Of the logit of t; 1 as in SD3's best runs."""
    shift: float = Field(1.0, gt=0)
    """t becomes shift t / (1 + (shift - 1) t), in training and in sampling alike. A latent with more positions needs
    more noise to be hidden as well: the square root of the ratio of positions; SD3 takes 3 for 1024 px."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of labels that are left out, without which there is no guidance."""


class SamplingConfig(Section):
    """Settings of the sampler."""

    method: Literal["euler", "heun"] = "heun"
    """heun: second order, two calls of the network a step."""
    steps: int = Field(25, gt=0, le=10_000)
    """Steps from noise to data."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance (Ho & Salimans 2022): v = v(no label) + guidance (v(label) - v(no label)); 1 is none."""


class Denoiser(nn.Module):
    """The one forward of training. It goes through `accelerator.prepare`, so that DDP's hooks fire."""

    def __init__(self, network: Any, classes: int) -> None:
        """network: of ldm_vae.denoisers; classes: how many there are, and the label that stands for none."""
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, noised: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """noised [B, c, h, w], times [B] in 0..1, labels [B] => velocity [B, c, h, w], fp32."""
        velocity: torch.Tensor = self.network(noised, TIMESTEPS * times, class_labels=labels).sample
        return at_least_fp32(velocity)


# --- learning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """Points on the paths of a batch: noised [B, c, h, w] at times [B], the velocity [B, c, h, w] there, labels [B]."""

    noised: torch.Tensor
    times: torch.Tensor
    labels: torch.Tensor
    velocity: torch.Tensor

    def loss(self, predicted: torch.Tensor) -> torch.Tensor:
        """Mean squared error of a predicted velocity [B, c, h, w]."""
        return (predicted - self.velocity).square().mean()


def draw_flow(
    latents: torch.Tensor, labels: torch.Tensor, positions: Sequence[int], seed: int, config: FlowConfig, classes: int
) -> Flow:
    """A point on the path of each of the latents [B, c, h, w], whose positions in the global stream are given; some of
    the labels [B] become `classes`, which stands for none."""
    noise = rng.normal(seed, "flow noise", positions, latents.shape[1:]).to(latents)
    logits = rng.normal(seed, "flow time", positions, ()).to(latents)
    times = shifted(torch.sigmoid(config.time_mean + config.time_std * logits), config.shift)
    drops = [rng.generator(seed, "label dropout", place).random() < config.label_dropout for place in positions]
    labels = labels.masked_fill(torch.tensor(drops, device=labels.device), classes)
    t = times.view(-1, 1, 1, 1)
    return Flow((1 - t) * latents + t * noise, times, labels, noise - latents)


def shifted(times: torch.Tensor, shift: float) -> torch.Tensor:
    """Times [B] moved towards noise (Esser et al. 2024, eq. 23)."""
    return shift * times / (1 + (shift - 1) * times)


# --- sampling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: torch.Tensor,
    labels: torch.Tensor,
    config: SamplingConfig,
    *,
    shift: float = 1.0,
    classes: int = 0,
) -> torch.Tensor:
    """noise [B, c, h, w] ~ N(0, I) => latents [B, c, h, w], by solving dx = v dt from t = 1 to 0.

    Args:
        velocity: a Denoiser, or any function of that form.
        labels: [B] int64; `classes` stands for none.
        shift: that of training.
        classes: the label for none, for guidance.
    """
    ask = velocity if config.guidance == 1 else guided(velocity, config.guidance, classes)
    x = noise
    for now, then in itertools.pairwise(time_grid(config.steps, shift).to(noise).unbind()):
        slope = ask(x, now.expand(len(x)), labels)
        # the last step ends at data, where a network has hardly been trained: Euler's
        if config.method == "heun" and then > 0:
            ahead = ask(x + (then - now) * slope, then.expand(len(x)), labels)
            slope = (slope + ahead) / 2
        x = x + (then - now) * slope
    return x


def time_grid(steps: int, shift: float) -> torch.Tensor:
    """Times [steps + 1] from 1 to 0: diffusers' grid, as its SD3 and FLUX pipelines ask for it."""
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    times: torch.Tensor = scheduler.sigmas
    return times


def flow_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler that goes with a trained network; saved beside it."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)


def guided(velocity: Velocity, guidance: float, classes: int) -> Velocity:
    """Velocity with classifier-free guidance: one call of twice the batch."""

    def ask(noised: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        both = torch.cat([torch.full_like(labels, classes), labels])
        without, with_label = velocity(noised.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return without + guidance * (with_label - without)

    return ask
