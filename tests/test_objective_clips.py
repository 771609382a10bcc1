"""Objective and adversary of clips: terms that see clips, frames that are chosen by key, PatchGAN over time; and what
has no clips to see is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from images import write_images
from sentences import refused
from tiny_classes import tiny
from torch import nn
from training_runs import one_sentence, run, write_config

from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.autoencoder.signals import clips_of, frames_of, spread_frames
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.dry_run import plan
from ldm_vae.training.objective import Objective
from ldm_vae.training.smallest_crop import shortest
from ldm_vae.training.state import build_state

SETTINGS: dict[str, Any] = {
    "output_dir": "unused",
    "resolution": 16,
    "train_batch_size": 2,
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "losses": {"l1": {}},
    "adversary": {"weight": 0.5},
    "discriminator": {"kind": "patchgan", "width": 8, "layers": 1, "dimensions": 3},
    "data": {"kind": "folder", "path": "nowhere", "frames": 5},
}


def settings(**changes: Any) -> Training:
    return config.validate(Training, SETTINGS | changes, "test")


def clips(frames: int, count: int = 2, side: int = 16, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, frames, side, side, generator=draw, dtype=torch.float64) * 2 - 1


def reconstruction(pixels: torch.Tensor, target: torch.Tensor, draws: torch.Tensor | None = None) -> Reconstruction:
    """Of clips."""
    moments = Moments.point(target)
    return Reconstruction(target, frames_of(pixels), frames_of(target), moments, target, (), draws=draws)


# --- terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_temporal_difference_is_its_formula(norm: str, power: int) -> None:
    pixels, target = clips(5), clips(5, seed=1)
    found = TemporalDifference(norm=norm).build()(pixels, target)
    expected = np.abs(np.diff(pixels.numpy(), axis=2) - np.diff(target.numpy(), axis=2)) ** power
    assert found.item() == pytest.approx(expected.mean(), rel=1e-12)
    # what all frames share is no flicker
    assert TemporalDifference(norm=norm).build()(target + 0.5, target).item() == pytest.approx(0.0, abs=1e-12)


def test_one_frame_has_no_differences_and_a_gradient_of_zero() -> None:
    objective = Objective({"l1": L1(), "time": TemporalDifference(weight=100.0)})
    pixels, target = clips(1).requires_grad_(), clips(1, seed=1)
    total, logs = objective.pixel_terms(frames_of(pixels), reconstruction(pixels, target))
    assert logs["loss/time"].item() == 0.0 and total.item() == logs["loss/l1"].item()
    (gradient,) = torch.autograd.grad(total, pixels)
    expected = (pixels.detach() - target).sign() / target.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_frames_and_clips_are_each_others_inverse() -> None:
    given = clips(5)
    assert torch.equal(clips_of(frames_of(given), 5), given)
    assert torch.equal(frames_of(given)[7], given[1, :, 2])


# --- chosen frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "wanted"), [(9, 2), (9, 4), (17, 3), (5, 5), (3, 8), (1, 4)])
def test_each_frame_is_chosen_as_often(count: int, wanted: int) -> None:
    draws = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    found = spread_frames(draws, count, wanted).view(len(draws), -1)
    places = found - count * torch.arange(len(draws))[:, None]
    chosen = min(count, wanted)
    assert places.shape[1] == chosen and bool((places.diff(dim=1) > 0).all())  # no frame twice
    share = torch.bincount(places.flatten(), minlength=count) / len(draws)
    torch.testing.assert_close(share, torch.full((count,), chosen / count), rtol=0, atol=1e-3)
    # fp32 may round a draw to 1
    assert int(spread_frames(torch.ones(2), count, wanted).max()) == 2 * count - 1


def test_the_mean_over_chosen_frames_is_unbiased() -> None:
    pixels, target = clips(9, count=1).expand(3000, -1, -1, -1, -1), clips(9, count=1, seed=1)
    whole = Objective({"l1": L1(), "l2": L2()})
    some = Objective({"l1": L1(frames=2), "l2": L2()})
    draws = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    r = reconstruction(pixels, target.expand_as(pixels), draws)
    expected, found = (one.pixel_terms(r.pixels, r)[1] for one in (whole, some))
    assert found["loss/l1"].item() == pytest.approx(expected["loss/l1"].item(), rel=1e-4)
    assert found["loss/l2"].item() == expected["loss/l2"].item()
    one = Reconstruction(r.images[:1], r.pixels[:9], r.target[:9], r.moments, r.latents, (), draws=draws[:1])
    assert some.pixel_terms(one.pixels, one)[1]["loss/l1"].item() != pytest.approx(expected["loss/l1"].item(), rel=1e-3)


def test_the_choice_is_the_clips_own_and_moves_no_other_draw() -> None:
    vae = tiny("AutoencoderKLWan")
    network = TrainableAutoencoder(vae)
    images = clips(5, count=6).float()
    noise = posterior_noise(3, range(6), network.noise_shape(5, 16, 16))
    with torch.no_grad():
        whole = network(images, noise)
        # neither rank, neighbours nor a resume matter
        alone = network(images[4:5], posterior_noise(3, [4], network.noise_shape(5, 16, 16)))
    assert whole.draws is not None and torch.equal(whole.draws[4:5], alone.draws)
    assert torch.equal(whole.some(whole.target, 2)[8:10], alone.some(alone.target, 2))
    assert len(whole.draws.unique()) == 6 and 0 < float(whole.draws.min()) < float(whole.draws.max()) < 1
    own = posterior_noise(3, range(6), (16, 2, 2, 2))
    assert torch.equal(noise[:, :16], own) and network.noise_shape(16, 16) == (16, 2, 2)


def test_a_choice_where_there_is_none_is_refused() -> None:
    with refused(UsageError, "losses.kl.frames"):
        Objective({"l1": L1(), "kl": KL(frames=2)})
    with refused(UsageError, "losses.time.frames"):
        Objective({"l1": L1(), "time": TemporalDifference(frames=2)})


# --- PatchGAN over time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "spectral", "none", "batch"])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_clips_of_any_length_have_logits(norm: Any, frames: int) -> None:
    critic = PatchGAN(width=8, layers=2, norm=norm, dimensions=3).build().double()
    images = clips(frames, side=32)
    logits = critic(images)
    flat = PatchGAN(width=8, layers=2, norm=norm).build().double()(images[:, :, 0])
    assert critic.domain == "clips"
    assert logits.shape == (*flat.shape[:2], -(-frames // 4), *flat.shape[2:])


@pytest.mark.parametrize(("layers", "seen"), [(1, 11), (2, 23), (3, 31)])
def test_a_patch_sees_as_many_frames_as_its_option_says(layers: int, seen: int) -> None:
    critic = PatchGAN(width=4, layers=layers, norm="none", dimensions=3).build().double()
    images = clips(49, count=1, side=32).requires_grad_()
    logits = critic(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2].sum(), images)
    frames = gradient.abs().sum(dim=(0, 1, 3, 4)).nonzero().flatten()
    assert len(frames) == seen == int(frames[-1] - frames[0]) + 1


def test_group_norm_mixes_no_clips() -> None:
    critic = PatchGAN(width=8, layers=2, dimensions=3).build().double()
    first, other = clips(5, side=32), clips(5, side=32, seed=1)
    both = torch.cat([first, other])
    torch.testing.assert_close(critic(both)[:2], critic(first), rtol=1e-12, atol=1e-15)


def test_r1_of_clips_is_that_of_a_linear_discriminator() -> None:
    # D(x) = mean over patches of (w * x): the gradient of a clip is w / patches at every place it is read
    layer = nn.Conv3d(3, 1, 2, stride=2, bias=False)
    real = torch.randn(4, 3, 4, 6, 6, requires_grad=True)
    penalty = Adversary(AdversaryConfig(r1_weight=10.0, r1_every=4)).r1(real, layer(real))
    expected = 0.5 * 10.0 * 4 * layer.weight.detach().square().sum().item() / 18
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


# --- before the first step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": SETTINGS["data"] | {"frames": None}}, "discriminator"),
        ({"data": SETTINGS["data"] | {"frames": 1}}, "discriminator"),
        (
            {
                "data": SETTINGS["data"] | {"frames": None},
                "losses": {"l1": {}, "time": {"kind": "temporal_difference"}},
                "adversary": {"weight": 0.0},
            },
            "losses.time",
        ),
        (
            {
                "data": SETTINGS["data"] | {"frames": None},
                "losses": {"l1": {}, "ssim": {"frames": 2}},
                "adversary": {"weight": 0.0},
            },
            "losses.ssim.frames",
        ),
        ({"discriminator": SETTINGS["discriminator"] | {"layers": 4}}, "discriminator"),
    ],
)
def test_what_has_no_clips_or_no_room_is_refused_before_the_first_step(changes: dict[str, Any], field: str) -> None:
    chosen = settings(**changes)
    for start in (lambda: plan(chosen), lambda: build_state(chosen, Accelerator(cpu=True), build_autoencoder(chosen))):
        with refused(UsageError, field) as refusal:
            start()
        assert "clip" in str(refusal.value) and "\n" not in str(refusal.value)


class NeedsFour(nn.Module):
    """A discriminator of one's own, whose first layer wants four frames."""

    domain = "clips"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 1, 4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)


def test_the_shortest_clip_must_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(settings().discriminator), "build", lambda *_: NeedsFour())
    monkeypatch.setattr(type(settings().discriminator), "outline", lambda *_: NeedsFour())
    assert shortest(settings(), 2) == 1  # an image among the videos
    with refused(UsageError, "discriminator") as refusal:
        plan(settings())
    assert "the shortest clip, 1 x 16 x 16 px" in str(refusal.value)
    without = {"buckets": {"shapes": [[5, 16, 16]]}}
    assert shortest(settings(**without), 2) == 5
    assert plan(settings(**without)).forward_gflop["discriminator"] > 0


def test_files_of_which_none_is_a_video_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    path = write_config(tmp_path, images, data={"kind": "folder", "path": str(images), "frames": 9})
    said = one_sentence(run(path), 2)
    assert "data.frames: 9, and none of 4 files is a video of so many frames" in said


def test_channels_last_is_for_weights_of_either_rank() -> None:
    chosen = settings(channels_last=True)
    vae = tiny("AutoencoderKLWan").requires_grad_(True).train()
    state = build_state(chosen, Accelerator(cpu=True), vae)
    for network, layer in ((vae, vae.decoder.conv_in), (state.critic, state.critic.network[0])):
        assert layer.weight.ndim == 5 and layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
        flat = [one for one in network.parameters() if one.ndim == 4]
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in flat)
    images = clips(5).float()
    logs = state.step(images, torch.zeros(2, *state.network.noise_shape(5, 16, 16)), 0)
    assert torch.isfinite(logs["adversary/weight"])


# --- the cost ---------------------------------------------------------------------------------------------------------


def test_the_plan_counts_clips_and_the_frames_that_are_chosen() -> None:
    flat = {"discriminator": SETTINGS["discriminator"] | {"dimensions": 2}}
    image = plan(settings(data=SETTINGS["data"] | {"frames": None}, **flat))
    clip = plan(settings(**flat))
    for name, value in image.forward_gflop.items():  # a class of images: five frames are five images
        assert clip.forward_gflop[name] == pytest.approx(5 * value, rel=1e-9), name
    assert clip.step_gflop == pytest.approx(5 * image.step_gflop, rel=0.01)
    assert plan(settings()).forward_gflop["discriminator"] != clip.forward_gflop["discriminator"]
    ssim = [plan(settings(losses={"l1": {}, "ssim": more}, **flat)) for more in ({}, {"frames": 2}, {"frames": 9})]
    whole, some, all_of_them = (one.forward_gflop["ssim"] for one in ssim)
    assert some == pytest.approx(whole * 2 / 5, rel=1e-9) and all_of_them == whole > 0
    assert ssim[1].step_gflop < ssim[0].step_gflop == ssim[2].step_gflop
