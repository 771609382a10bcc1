"""Cost of a run on a latent store, counted on tensors without content, for `--dry_run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.autoencoder.trainable import count_parameters
from ldm_vae.core import config
from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.run.store_training import StoredSamples, StoreTraining

GB = 1e9

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class StepCost:
    """Parameters, GFLOP of a training step per image, and bytes by what holds them."""

    parameters: int
    gflop: float
    held: dict[str, int]


def count_step(
    build: Callable[[], Network], loss: Callable[[Network], torch.Tensor], batch: int, mixed_precision: str = "no"
) -> StepCost:
    """Cost of a training step of `batch` images with Adam: the forward pass of `loss` and its backward."""
    with FakeTensorMode(), gpu_autocast(mixed_precision):
        network = build()
        with Cost() as cost:
            torch.autograd.backward(loss(network))
    parameters = count_parameters(network.parameters())
    # 4 bytes a number; Adam has two moments
    held = {"weights": 4 * parameters, "averaged weights": 4 * parameters, "Adam's moments": 8 * parameters}
    return StepCost(parameters, cost.flops / batch / 1e9, held | {"activations and gradients": cost.peak_bytes})


def plan(settings: StoreTraining, samples: StoredSamples, cost: StepCost, processes: int) -> str:
    """The resolved config as YAML, then the cost as comments."""
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    count = len(samples.dataset)
    labels = f"{len(samples.classes)} classes of `{samples.label_column}`" if samples.classes else "unconditional"
    memory = ", ".join(f"{name} {value / GB:.2f}" for name, value in cost.held.items())
    lines = {
        "latents": f"{count:,} of {' x '.join(map(str, samples.shape))}, {labels}",
        "parameters": f"{cost.parameters / 1e6:.2f} M; {cost.gflop:.4g} GFLOP a training step and image",
        "memory, GB": f"{memory}; peak about {sum(cost.held.values()) / GB:.1f} in a process",
        "run": f"{settings.max_train_images // batch:,} updates of {batch}, "
        f"{settings.max_train_images / count:.3g} epochs, {settings.max_train_images * cost.gflop / 1e3:.4g} TFLOP",
    }
    return config.dump(settings) + "".join(f"# {name + ':':12} {text}\n" for name, text in lines.items())
