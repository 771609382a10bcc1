"""Flow matching: against Gaussian data, whose velocity has a closed form, and against diffusers' own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel
from sentences import refused

from ldm_vae.core.errors import UsageError
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.denoisers.unet import Config as UNet
from ldm_vae.diffusion.flow import (
    Denoiser,
    FlowConfig,
    SamplingConfig,
    draw_flow,
    flow_scheduler,
    sample,
    time_grid,
)

MEAN, STD = torch.tensor([0.7, -1.5]).view(1, 2, 1, 1).double(), torch.tensor([0.3, 2.0]).view(1, 2, 1, 1).double()
KINDS = {
    "dit": DiT(num_layers=2, num_attention_heads=2, attention_head_dim=8),
    "unet": UNet(block_out_channels=(8, 16), layers_per_block=1, attention_levels=(1,), norm_num_groups=4,
                 attention_head_dim=8),
}  # fmt: skip


def exact(noised: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """E[e - x | x_t] for x ~ N(MEAN, STD^2): the regression of two Gaussians on each other."""
    t = times.view(-1, 1, 1, 1)
    variance = ((1 - t) * STD) ** 2 + t**2
    return (t - (1 - t) * STD**2) / variance * (noised - (1 - t) * MEAN) - MEAN


def off(method: str, steps: int, shift: float = 1.0) -> float:
    """The exact flow carries noise e to MEAN + STD e: how far the sampler ends from there."""
    noise = torch.randn(64, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(method=method, steps=steps)
    made = sample(exact, noise, torch.zeros(64, dtype=torch.long), config, shift=shift)
    return float((made - (MEAN + STD * noise)).abs().max())


def test_the_exact_velocity_carries_noise_to_the_gaussian_and_heun_is_of_second_order() -> None:
    assert off("euler", 400) < 0.05 and off("heun", 400) < 2e-3 and off("heun", 400, shift=3.0) < 1e-2
    assert off("euler", 200) / off("euler", 400) == pytest.approx(2, rel=0.2)
    # its last step is Euler's, whose error is of second order too
    assert off("heun", 200) / off("heun", 400) == pytest.approx(4, rel=0.25)


def test_the_closed_form_is_what_the_loss_asks_for() -> None:
    """Of the family a v + b the true velocity has the smallest loss, which is the conditional variance."""
    draw = torch.Generator().manual_seed(1)
    clean = MEAN + STD * torch.randn(2000, 2, 2, 2, dtype=torch.float64, generator=draw)
    flow = draw_flow(clean, torch.zeros(2000, dtype=torch.long), range(2000), 0, FlowConfig(), 0)
    best = exact(flow.noised, flow.times, flow.labels)
    loss = float(flow.loss(best))
    t = flow.times.view(-1, 1, 1, 1)
    expected = float(((1 + STD**2) - (t - (1 - t) * STD**2) ** 2 / (((1 - t) * STD) ** 2 + t**2)).mean())
    assert loss == pytest.approx(expected, rel=0.05)
    for wrong in (0.9 * best, 1.1 * best, best + 0.1, best - 0.1):
        assert float(flow.loss(wrong)) > loss


def test_a_point_on_the_path_gives_back_both_ends_and_times_are_logit_normal() -> None:
    clean = torch.randn(3000, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(3000) % 5
    flow = draw_flow(clean, labels, range(3000), 0, FlowConfig(time_mean=0.5, time_std=0.7), 5)
    t = flow.times.view(-1, 1, 1, 1)
    torch.testing.assert_close(flow.noised - t * flow.velocity, clean, atol=1e-5, rtol=0)
    noise = flow.noised + (1 - t) * flow.velocity
    assert abs(float(noise.mean())) < 0.03 and float(noise.std()) == pytest.approx(1, abs=0.03)
    logits = torch.logit(flow.times)
    assert (float(logits.mean()), float(logits.std())) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.7, abs=0.05))
    dropped = flow.labels == 5
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(flow.labels[~dropped], labels[~dropped])
    moved = draw_flow(clean, labels, range(3000), 0, FlowConfig(time_mean=0.5, time_std=0.7, shift=3.0), 5)
    torch.testing.assert_close(moved.times, 3 * flow.times / (1 + 2 * flow.times))


def test_a_draw_depends_on_the_position_alone() -> None:
    clean, labels = torch.randn(8, 2, 4, 4), torch.arange(8)
    whole = draw_flow(clean, labels, range(8), 7, FlowConfig(label_dropout=0.5), 9)
    torch.randn(3)  # the global generator has no part in it
    halves = [draw_flow(clean[half], labels[half], range(8)[half], 7, FlowConfig(label_dropout=0.5), 9)
              for half in (slice(0, 4), slice(4, 8))]  # fmt: skip
    for name in ("noised", "times", "labels", "velocity"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    assert not torch.equal(whole.times, draw_flow(clean, labels, range(8, 16), 7, FlowConfig(), 9).times)


def test_euler_is_what_diffusers_scheduler_does() -> None:
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.zeros(2, dtype=torch.long)
    scheduler = flow_scheduler(2.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.equal(scheduler.sigmas, time_grid(4, 2.0))
    x = noise.float()
    for time in scheduler.timesteps:
        x = scheduler.step(exact(x, time.expand(2) / 1000, labels).float(), time, x).prev_sample
    ours = sample(exact, noise, labels, SamplingConfig(method="euler", steps=4), shift=2.0)
    torch.testing.assert_close(ours.float(), x, atol=1e-5, rtol=1e-5)


def test_guidance_goes_beyond_the_label() -> None:
    def velocity(noised: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labels.to(noised).view(-1, 1, 1, 1).expand_as(noised)  # 9 without a label

    noise, labels = torch.zeros(2, 1, 1, 1), torch.tensor([1, 4])
    for guidance, expected in ((0.0, [9, 9]), (1.0, [1, 4]), (2.0, [-7, -1])):
        made = sample(velocity, noise, labels, SamplingConfig(steps=3, guidance=guidance), classes=9)
        assert made.flatten().tolist() == pytest.approx([-value for value in expected])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_network_begins_as_zero_learns_and_is_loaded_by_diffusers(kind: str, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(KINDS[kind].build(4, (8, 8), classes), classes).train()
    x, times, labels = torch.randn(5, 4, 8, 8), torch.rand(5), torch.arange(5) % (classes + 1)
    assert torch.equal(denoiser(x, times, labels), torch.zeros_like(x))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (denoiser(x, times, labels) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for name, p in denoiser.named_parameters())
    made = denoiser(x, times, labels)
    torch.testing.assert_close(denoiser(x, times, labels), made)  # in training mode: nothing is dropped by chance
    assert not torch.allclose(denoiser(x, 1 - times, labels), made)
    if classes:
        assert not torch.allclose(denoiser(x, times, (labels + 1) % 4), made)
    denoiser.network.save_pretrained(tmp_path)
    again = Denoiser(AutoModel.from_pretrained(str(tmp_path)), classes).eval()
    torch.testing.assert_close(again(x, times, labels), made)


@pytest.mark.parametrize(
    ("config", "size", "field"),
    [
        (KINDS["dit"], (8, 6), "denoiser.patch_size"),
        (DiT(patch_size=3), (8, 8), "denoiser.patch_size"),
        (KINDS["unet"], (7, 8), "denoiser.block_out_channels"),
    ],
)
def test_a_latent_that_does_not_fit_is_one_sentence(config: Any, size: tuple[int, int], field: str) -> None:
    with refused(UsageError, field):
        config.build(4, size, 0)
