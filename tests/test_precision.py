"""Mixed precision leaves fp32 master weights: at a learning rate of 4.5e-6 bf16 moves as many weights as fp32 does."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_classes import tiny

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep


def reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def _own_accelerator():
    reset()
    yield
    reset()


def moved(precision: str, clips: bool = False) -> tuple[float, torch.dtype]:
    """Share of the autoencoder's weights that five updates at 4.5e-6 have moved, and their type."""
    reset()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4).build()
    if clips:
        vae = tiny("AutoencoderKLWan").requires_grad_(True).train()
    network = TrainableAutoencoder(vae)
    critic = PatchGAN(width=8, layers=1, dimensions=3 if clips else 2).build()
    of_clips = {"time": TemporalDifference(), "some": L2(frames=2)} if clips else {}
    optimizers = [torch.optim.AdamW(module.parameters(), lr=4.5e-6, weight_decay=0.0) for module in (network, critic)]
    step = TrainingStep(
        accelerator,
        accelerator.prepare(network),
        Objective({"l1": L1(), "kl": KL(), **of_clips}),
        accelerator.prepare(optimizers[0]),
        Adversary(AdversaryConfig(weight=0.5)),
        accelerator.prepare(critic),
        accelerator.prepare(optimizers[1]),
    )
    before = [parameter.detach().clone() for parameter in network.parameters()]
    images = torch.rand(2, 3, *((9, 16, 16) if clips else (16, 16))) * 2 - 1
    for _ in range(5):
        logs = step(images, torch.randn(2, *network.noise_shape(*images.shape[2:])))
    assert all(value.dtype == torch.float32 for value in logs.values())
    changed = sum(int((old != new).sum()) for old, new in zip(before, network.parameters(), strict=True))
    return changed / sum(parameter.numel() for parameter in before), before[0].dtype


@pytest.mark.parametrize("clips", [False, True])
def test_bf16_moves_the_same_share_of_weights_as_fp32(clips: bool) -> None:
    fp32, _ = moved("no", clips)
    bf16, dtype = moved("bf16", clips)
    assert dtype == torch.float32
    assert fp32 > 0.95
    assert bf16 == pytest.approx(fp32, abs=0.02)


def test_cast_weights_would_hardly_move() -> None:
    """Why: an update of 4.5e-6 is below half a step of bf16 for nearly every weight of a convolution."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(16, 16, 3).to(torch.bfloat16)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=4.5e-6, weight_decay=0.0)
    for _ in range(5):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
    assert (layer.weight != before).float().mean() < 0.3
