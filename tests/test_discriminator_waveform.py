"""The discriminator of sounds and games of several heads: published networks and losses, one sound at a time, the
step's gradients, micro-batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from repository import ROOT
from sentences import refused
from torch import nn
from two_heads import TwoHeads

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core import rng
from ldm_vae.core.config import options, validate
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.discriminators.waveform import Config, Waveform
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.monitor import logit_statistics
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

SMALL = {"periods": (2, 3), "windows": (128, 64), "period_width": 4, "stft_width": 4}


def sounds(count: int = 2, channels: int = 1, length: int = 600) -> torch.Tensor:
    return 0.2 * torch.randn(count, channels, length, generator=torch.Generator().manual_seed(0)) + 0.1


def build(channels: int = 1, **changes: Any) -> Waveform:
    torch.manual_seed(1)
    return Config(**SMALL | changes).build(channels)


def descripts(critic: Waveform, sound: torch.Tensor) -> list[list[torch.Tensor]]:
    """Feature maps of dac/model/discriminator.py, in its order, with the weights of ours (frames centred as torch.stft
    does; theirs are cut by `match_stride`)."""
    x = sound - sound.mean(dim=-1, keepdim=True)
    x = 0.8 * x / (x.abs().max(dim=-1, keepdim=True)[0] + 1e-9)
    found = []
    for head, period in zip(critic.heads, (2, 3), strict=False):
        more = (period - x.shape[-1] % period) % period
        y = F.pad(x, (0, more), mode="reflect")
        y = y.view(y.shape[0], 1, y.shape[-1] // period, period)
        maps = []
        for layer, stride in zip(head.layers, (3, 3, 3, 3, 1), strict=True):
            y = F.leaky_relu(F.conv2d(y, layer.weight, layer.bias, (stride, 1), (2, 0)), 0.1)
            maps.append(y)
        found.append([*maps, F.conv2d(y, head.last.weight, head.last.bias, padding=(1, 0))])
    for head, window in zip(critic.heads[2:], (128, 64), strict=True):
        spectrum = torch.stft(x[:, 0], window, window // 4, window=torch.hann_window(window), return_complex=True)
        y = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # b f t c -> b c t f
        bins = window // 2 + 1
        maps, ends = [], []
        for stack, (low, high) in zip(
            head.stacks, ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)), strict=True
        ):
            band = y[..., int(low * bins) : int(high * bins)]
            for layer, stride, pad in zip(stack, (1, 2, 2, 2, 1), (4, 4, 4, 4, 1), strict=True):
                band = F.leaky_relu(F.conv2d(band, layer.weight, layer.bias, (1, stride), (1, pad)), 0.1)
                maps.append(band)
            ends.append(band)
        found.append([*maps, F.conv2d(torch.cat(ends, dim=-1), head.last.weight, head.last.bias, padding=1)])
    return found


@torch.no_grad()
def test_heads_are_descripts() -> None:
    critic = build()
    logits, features = critic(sounds(length=601), features=True)
    expected = descripts(critic, sounds(length=601))
    torch.testing.assert_close(logits, [maps[-1] for maps in expected], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, [one for maps in expected for one in maps[:-1]], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(critic(sounds(length=601)), logits, strict=True))
    # at full size the weights of dac's Discriminator(): five periods, three windows of five bands
    period = 5 * (32 + 32 * 128 + 128 * 512 + 512 * 1024 + 1024 * 1024) + 3 * 1024
    window = 5 * (2 * 32 * 27 + 3 * 32 * 32 * 27 + 32 * 32 * 9) + 32 * 9
    layers = [one for one in Config().build().modules() if isinstance(one, nn.Conv2d)]
    assert sum(layer.weight.numel() for layer in layers) == 5 * period + 3 * window


@torch.no_grad()
def test_sounds_are_judged_one_by_one_and_not_by_their_level() -> None:
    critic, batch = build(2).double(), sounds(3, 2).double()
    together = critic(batch)
    for place in range(3):
        alone = critic(batch[place : place + 1])
        torch.testing.assert_close(alone, [one[place : place + 1] for one in together], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(critic(0.3 * batch + 0.5), together, rtol=1e-9, atol=1e-12)
    assert (critic(batch * torch.tensor([1.0, 0.5]).view(1, 2, 1))[0] - together[0]).abs().max() > 1e-4  # the balance


def test_gradients_are_finite_in_silence_and_under_autocast() -> None:
    critic = build()
    for level in (0.0, 1e-9, 1.0):
        x = (level * sounds()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = critic(x)
        (gradient,) = torch.autograd.grad(sum(head.sum() for head in logits), x)
        assert gradient.isfinite().all() and gradient.abs().max() < 1e5
        assert all(head.dtype == torch.float32 for head in logits)


def test_r1_is_the_gradient_of_the_mean_over_heads() -> None:
    critic, x = build().double(), sounds().double().requires_grad_()
    adversary = Adversary(AdversaryConfig(weight=1, r1_weight=2.0, r1_every=1))
    penalty = adversary.r1(x, critic(x))
    mean = torch.stack([head.flatten(1).mean(dim=1) for head in critic(x)]).mean(dim=0)
    (gradient,) = torch.autograd.grad(mean.sum(), x)
    assert penalty.item() == pytest.approx(gradient.square().flatten(1).sum(dim=1).mean().item(), rel=1e-9)
    penalty.backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in critic.parameters())


def test_losses_are_descripts_and_heads_count_alike() -> None:
    critic = build()
    real, fake = sounds(), sounds() + 0.1 * sounds(length=601)[..., 1:]
    game = Adversary(AdversaryConfig(weight=1, loss="least_squares", feature_matching=2.0))
    (real_logits, real_maps), (fake_logits, fake_maps) = (critic(one, features=True) for one in (real, fake))
    theirs, other = descripts(critic, real), descripts(critic, fake)
    # dac/nn/loss.py GANLoss, which sums
    loss_d = sum((y[-1] ** 2).mean() + ((1 - x[-1]) ** 2).mean() for x, y in zip(theirs, other, strict=True))
    loss_g = sum(((1 - y[-1]) ** 2).mean() for y in other)
    pairs = [pair for x, y in zip(theirs, other, strict=True) for pair in zip(x[:-1], y[:-1], strict=True)]
    loss_f = sum(F.l1_loss(b, a.detach()) for a, b in pairs)
    assert game.discriminator_loss(real_logits, fake_logits).item() == pytest.approx(loss_d.item() / 8, rel=1e-5)
    assert game.generator_loss(fake_logits).item() == pytest.approx(loss_g.item() / 4, rel=1e-5)
    matching = game.feature_matching(real_maps, fake_maps)
    assert matching.item() == pytest.approx(2 * loss_f.item() / len(pairs), rel=1e-5)
    assert game.feature_matching(real_maps, real_maps).item() == 0
    # a discriminator that knows nothing: half and half
    blind = [torch.full((2, 1, 3), 0.5), torch.full((2, 1, 90), 0.5)]
    assert game.discriminator_loss(blind, blind).item() == pytest.approx(0.25)
    # each head counts alike, however many logits it has; the boundary is that of the loss
    sure = [torch.full((2, 1, 3), 0.9), torch.full((2, 1, 90), 0.2)]
    found = logit_statistics(sure, blind, game.boundary)
    assert found["health/real_accuracy"] == 0.5 and found["health/logit_margin"].item() == pytest.approx(0.05)
    for loss in ("hinge", "vanilla", "non_saturating"):
        one = Adversary(AdversaryConfig(weight=1, loss=loss))
        for heads in (sure, blind):
            means = [one.generator_loss(head) for head in heads]
            assert one.generator_loss(heads).item() == pytest.approx((sum(means) / 2).item(), rel=1e-6)


def step_of(parts: int = 1, critic: Any = TwoHeads, **adversary: Any) -> TrainingStep:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().double()
    network, objective, judge = TrainableAutoencoder(vae), Objective({"l1": L1()}).double(), critic().double()
    optimizers = [
        accelerator.prepare(torch.optim.SGD(trainable_parameters([part]), lr=0.1)) for part in (network, judge)
    ]
    options = {"weight": 0.5, "adaptive": False, "loss": "least_squares", "feature_matching": 3.0} | adversary
    game = Adversary(AdversaryConfig(**options)).double()
    return TrainingStep(
        accelerator, accelerator.prepare(network), objective, optimizers[0], game, accelerator.prepare(judge),
        optimizers[1],
    )  # fmt: skip


def train(step: TrainingStep, parts: int, updates: int = 3) -> dict[str, torch.Tensor]:
    for seen in range(0, 4 * updates, 4):
        for start in range(seen, seen + 4, 4 // parts):
            positions = range(start, start + 4 // parts)
            images = rng.normal(1, "images", positions, (3, 16, 16)).double().tanh()
            step(images, posterior_noise(2, positions, step.model.noise_shape(16, 16)).double(), seen)
    networks = {"model": step.model, "critic": step.discriminator}
    return {f"{name}.{key}": value for name, one in networks.items() for key, value in one.state_dict().items()}


@pytest.mark.parametrize("more", [{}, {"r1_weight": 10.0, "r1_every": 2, "lecam_weight": 0.1}], ids=["", "regularised"])
def test_micro_batches_leave_what_one_batch_leaves(more: dict[str, Any]) -> None:
    whole, parts = train(step_of(1, **more), 1), train(step_of(2, **more), 2)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_features_pull_the_reconstruction_and_not_the_discriminator() -> None:
    step = step_of(adaptive=True)
    images = rng.normal(1, "images", range(4), (3, 16, 16)).double().tanh()
    r = step.model(images, posterior_noise(2, range(4), step.model.noise_shape(16, 16)).double())
    pixels = r.pixels.detach().requires_grad_()
    cotangent, logs = step._adversary_cotangent(pixels, torch.ones_like(pixels) / pixels.numel(), r)
    logits, maps = step.discriminator(pixels, features=True)
    generator = sum(((1 - head) ** 2).mean() for head in logits) / 2
    wanted = step.discriminator(images, features=True)[1]
    matching = 3 * sum((a.detach() - b).abs().mean() for a, b in zip(wanted, maps, strict=True)) / 2
    (expected,) = torch.autograd.grad(generator + matching, pixels)
    torch.testing.assert_close(cotangent, logs["adversary/weight"] * expected, rtol=1e-9, atol=1e-15)
    assert logs["adversary/feature_matching"].item() == pytest.approx(matching.item())
    assert logs["adversary/generator"].item() == pytest.approx(generator.item())
    assert all(one.grad is None for one in step.discriminator.parameters())


def test_the_documents_game_can_be_played() -> None:
    text = (ROOT / "docs" / "audio.md").read_text(encoding="utf-8")
    blocks = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    (found,) = [block for block in blocks if "discriminator" in block and "model" not in block]
    critic = validate(Config, found["discriminator"], "docs")
    assert critic == Config()  # the published heads
    adversary = validate(AdversaryConfig, found["adversary"], "docs")
    heads = len(critic.periods) + len(critic.windows)
    maps = 5 * len(critic.periods) + 25 * len(critic.windows)
    # Descript's 1 and 2, of sums
    assert adversary.weight / heads == 1 and adversary.weight * adversary.feature_matching / maps == 2
    assert {*found["losses"]} <= {*options("ldm_vae.losses")}


def test_what_cannot_be_is_one_sentence() -> None:
    with refused(UsageError, "adversary.feature_matching"):
        step_of(critic=lambda: PatchGAN(width=8, layers=1).build())
    for wrong, named in (({"periods": [], "windows": []}, "periods"), ({"windows": [30]}, "windows.0")):
        with refused(UsageError, named):
            validate(Config, wrong, "config")
    for x in (sounds()[:, :, :50], sounds()[:, :, :1], sounds()[None]):
        with refused(UsageError, "discriminator"):
            build()(x)
    with refused(UsageError, "discriminator"):
        build(periods=(1000,), windows=())(sounds(length=400))
