"""Half precision, layouts and synchronised batch norm; marked gpu, what only a GPU shows: fp16 with its loss scaler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from images import write_images
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from training_runs import metrics, newest, write_config

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.kernels.group_norm import fuse_norms
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

Logs = dict[str, float]
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]  # without a GPU the tests still have to be sound


def begun(device: str, precision: str, norm: str = "group") -> tuple[TrainableAutoencoder, TrainingStep]:
    """A small network and its step, at 4.5e-6."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
    assert accelerator.device.type == device
    network = TrainableAutoencoder(AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4).build())
    critic = PatchGAN.model_validate({"width": 8, "layers": 1, "norm": norm}).build()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=4.5e-6, weight_decay=0.0) for module in (network, critic)]
    step = TrainingStep(
        accelerator, accelerator.prepare(network), Objective({"l1": L1(), "kl": KL()}),
        accelerator.prepare(optimizers[0]), Adversary(AdversaryConfig(weight=0.5, r1_weight=1.0)).to(device),
        accelerator.prepare(critic), accelerator.prepare(optimizers[1]),
    )  # fmt: skip
    return network, step


def trained(device: str, precision: str, steps: int = 5, norm: str = "group", **arrange: Any) -> tuple[float, Logs]:
    """(share of weights that moved, logs of the last step)."""
    network, step = begun(device, precision, norm)
    network.to(**arrange)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).to(device)
    for _ in range(steps):
        logs = step(images, torch.randn(2, 4, 16, 16).to(device))
    assert all(value.dtype == torch.float32 for value in logs.values())
    moved = sum(int((old != new).sum()) for old, new in zip(before, network.parameters(), strict=True))
    scalars = {name: float(value) for name, value in logs.items() if value.ndim == 0}
    return moved / sum(p.numel() for p in before), scalars


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        pytest.param("cpu", "bf16", marks=pytest.mark.slow),
        pytest.param("cuda", "bf16", marks=gpu),
        pytest.param("cuda", "fp16", marks=gpu),
    ],
)
def test_half_precision_moves_the_share_of_weights_that_fp32_does(device: str, precision: str) -> None:
    # the scaler starts at 65,536 and may leave out the first updates
    fp32, reference = trained(device, "no", steps=12)
    share, logs = trained(device, precision, steps=12)
    assert share == pytest.approx(fp32, abs=0.02)
    assert logs["loss/l1"] == pytest.approx(reference["loss/l1"], rel=0.02)
    # the gradient is unscaled before it is clipped and logged
    assert logs["gradient_norm/autoencoder"] == pytest.approx(reference["gradient_norm/autoencoder"], rel=0.1)
    assert logs["adversary/weight"] == pytest.approx(reference["adversary/weight"], rel=0.1)


def gradient(device: str, precision: str, fast: bool = False) -> torch.Tensor:
    """The autoencoder's gradient of one step, all weights in a row."""
    network, step = begun(device, precision)
    if fast:
        network.to(memory_format=torch.channels_last)
        assert fuse_norms(network)
    found: dict[torch.Tensor, torch.Tensor] = {}
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda it: found.update({it: it.grad.detach().clone()}))
    step((torch.rand(2, 3, 32, 32) * 2 - 1).to(device), torch.randn(2, 4, 16, 16).to(device))
    return torch.cat([found[parameter].flatten() for parameter in network.parameters()]).double()


@pytest.mark.parametrize("device", DEVICES)
def test_the_fast_step_has_the_plain_ones_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = gradient(device, "no")
    size = exact.norm()
    assert (gradient(device, "no", fast=True) - exact).norm() < 1e-4 * size
    noise = (gradient(device, "bf16") - exact).norm()
    fast = gradient(device, "bf16", fast=True)
    assert 0 < noise < 0.2 * size  # of L1, a sign
    assert (fast - exact).norm() < 1.2 * noise


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_and_synchronised_batch_norm_train(device: str) -> None:
    _, plain = trained(device, "no")
    _, laid_out = trained(device, "no", memory_format=torch.channels_last)
    assert laid_out["loss/l1"] == pytest.approx(plain["loss/l1"], rel=1e-3)
    share, _ = trained(device, "no", norm="sync_batch")
    assert share > 0.9


def program(config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own: a forked one cannot use CUDA if its parent has as much as asked for it."""
    command = [sys.executable, "-W", "ignore", "-m", "train.autoencoder", str(config), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


@gpu
@pytest.mark.parametrize("knobs", [{}, {"torch_compile": True, "channels_last": True}], ids=["plain", "compiled"])
def test_fp16_resumes_with_its_scaler(tmp_path: Path, knobs: dict[str, object]) -> None:
    images = write_images(tmp_path / "images", 11)
    config = write_config(tmp_path, images, mixed_precision="fp16", **knobs)
    first = program(config, "--max_train_images", "40")
    assert first.returncode == 0, first.stderr
    done = program(config)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert '"scaler"' in (newest(tmp_path / "run") / "state.json").read_text()
    assert metrics(tmp_path / "run")[-1]["images"] == 80


@gpu
def test_the_plan_holds_what_a_gpu_holds() -> None:
    images = torch.rand(4, 3, 128, 128, device="cuda") * 2 - 1
    network = TrainableAutoencoder(AutoencoderConfig().build().cuda().train())
    for counted in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(images, torch.randn(4, 4, 16, 16, device="cuda")).pixels.square().mean()
        loss.backward()  # the second time without what cuDNN finds out once
        network.zero_grad()
        if counted:
            held = torch.cuda.max_memory_allocated() - before
    with FakeTensorMode(), gpu_autocast("bf16"):
        outline = TrainableAutoencoder(AutoencoderConfig().build().train())
        with Cost() as cost:
            outline(torch.empty(4, 3, 128, 128), torch.empty(4, 4, 16, 16)).pixels.square().mean().backward()
    assert cost.peak_bytes == pytest.approx(held, rel=0.15)
