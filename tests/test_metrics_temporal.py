"""Metrics of clips: images' own frame by frame, a clip's value their mean, and errors of motion in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sentences import refused

from ldm_vae import measure
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.signals import clips_of
from ldm_vae.core.errors import UsageError
from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.profile import Profile
from ldm_vae.metrics.protocol import PINNED, by_name
from ldm_vae.metrics.psnr import psnr
from ldm_vae.metrics.select import build_metrics, default_names

CPU = torch.device("cpu")
T = 9


def clips(count: int = 2, frames: int = T, side: int = 48, channels: int = 3) -> torch.Tensor:
    """Grey levels 80..170 as pixels in [-1, 1]: errors of 40 levels clip nowhere."""
    draw = torch.Generator().manual_seed(frames)
    levels = torch.randint(80, 171, (count, channels, frames, side, side), generator=draw)
    return levels.float() / 127.5 - 1


def temporal(original: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
    return measure(original, reconstruction, metrics=["temporal_l1", "flicker"])


def test_a_steady_error_does_not_flicker() -> None:
    original = clips()
    steady = torch.randint(-40, 41, (2, 3, 1, 48, 48), generator=torch.Generator().manual_seed(1)) / 127.5
    found = temporal(original, original + steady)
    assert found["flicker"].tolist() == found["temporal_l1"].tolist() == [0.0, 0.0]


def test_an_error_drawn_anew_in_each_frame_flickers_by_the_root_of_two() -> None:
    original, sigma = clips(), 8.0
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    found = temporal(original, original + sigma * noise / 127.5)
    # rounding to levels adds 1/12 to the variance of each error
    deviation = math.sqrt(sigma**2 + 1 / 12)
    assert found["flicker"].tolist() == pytest.approx([math.sqrt(2) * deviation] * 2, rel=0.005)
    assert found["temporal_l1"].tolist() == pytest.approx([2 * deviation / math.sqrt(math.pi)] * 2, rel=0.005)


def test_an_error_of_alternating_sign_flickers_by_twice_its_size() -> None:
    original = clips(1)
    signs = torch.tensor([1.0, -1.0])[torch.arange(T) % 2].view(-1, 1, 1)
    found = temporal(original, original + 6 * signs / 127.5)
    assert found["flicker"].item() == pytest.approx(12) and found["temporal_l1"].item() == pytest.approx(12)
    # one frame of nine is off: two of eight differences are
    one = torch.zeros(T, 1, 1)
    one[4] = 10 / 127.5
    found = temporal(original, original + one)
    assert found["temporal_l1"].item() == pytest.approx(2 * 10 / 8)
    assert found["flicker"].item() == pytest.approx(10 * math.sqrt(2 / 8))


def test_what_does_not_move_in_the_reconstruction_is_the_motion_of_the_original() -> None:
    original = clips(1)
    still = original[:, :, :1].expand_as(original)
    moved = original[:, :, 1:] - original[:, :, :-1]
    assert temporal(original, still)["temporal_l1"].item() == pytest.approx(127.5 * moved.abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["psnr", "ssim", "l1", "lpips_alex"])
def test_a_clips_value_is_the_mean_over_its_frames(name: str) -> None:
    original = clips(side=32)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    reconstruction = original + torch.linspace(0.01, 0.3, T).view(-1, 1, 1) * noise
    found = measure(original, reconstruction, metrics=[name])[name]
    for row in range(2):
        frames = [
            measure(original[row : row + 1, :, t], reconstruction[row : row + 1, :, t], metrics=[name])[name].item()
            for t in range(T)
        ]
        assert found[row].item() == pytest.approx(sum(frames) / T, rel=1e-5)


def test_intervals_and_curves_are_over_clips() -> None:
    metrics = build_metrics(["psnr", "flicker"], CPU, 32, clips=True)
    original, noise = clips(5, side=32), torch.randn(5, 3, T, 32, 32, generator=torch.Generator().manual_seed(3))
    reconstruction = original + torch.linspace(0.02, 0.2, T).view(-1, 1, 1) * noise
    by_clip = []
    # padded, as a last batch is, and an image among the clips
    for rows, indices in (([0, 1, 2], [0, 1, 2]), ([3, 4, 4], [3, 4])):
        pair = PINNED.pair(original[rows], reconstruction[rows], indices)
        assert pair.count == len(indices) * T
        by_clip += [metric.update(pair) for metric in metrics]
    image = PINNED.pair(original[:1, :, :1], reconstruction[:1, :, :1], [9])
    assert metrics[1].update(image) is None
    metrics[0].update(image)
    frames = torch.stack([
        psnr(*(PINNED.quantise(one[:, :, t]) for one in (original, reconstruction))) for t in range(T)
    ])  # fmt: skip
    summary, flicker = (metric.compute() for metric in metrics)
    assert (summary.n, flicker.n) == (6, 5)
    expected = torch.cat([frames.mean(0), frames[:1, 0]])
    assert summary.mean == pytest.approx(expected.mean().item(), rel=1e-9)
    assert summary.std == pytest.approx(expected.std().item(), rel=1e-9)
    assert isinstance(metrics[0], ImageMetric) and isinstance(metrics[1], ImageMetric)
    curve = metrics[0].compute_frames()
    assert [one.n for one in curve] == [5] * T
    assert [one.mean for one in curve] == pytest.approx(frames.mean(1).tolist(), rel=1e-9)
    assert curve[3].std == pytest.approx(frames[3].std().item(), rel=1e-9)
    assert metrics[1].compute_frames() == []


def test_alpha_of_clips_is_composited_frame_by_frame() -> None:
    original = clips(1, frames=3, channels=4, side=16)
    reconstruction = (original + 0.1).clamp(-1, 1)
    found = measure(original, reconstruction, metrics=["psnr", "alpha_psnr", "flicker"], alpha=True)
    frames = [
        measure(original[:, :, t], reconstruction[:, :, t], metrics=["psnr", "alpha_psnr"], alpha=True)
        for t in range(3)
    ]
    for name in ("psnr", "alpha_psnr"):
        assert found[name].item() == pytest.approx(sum(one[name].item() for one in frames) / 3, rel=1e-6)
    assert found["flicker"].shape == (1,)


def test_profiles_of_a_clip_are_those_of_its_frames() -> None:
    draw = torch.Generator().manual_seed(0)
    moments = Moments(*(torch.randn(6, 4, 8, 8, generator=draw) for _ in range(2)))
    images = clips(1, frames=6, side=16)[0].transpose(0, 1)
    of_frames, of_clips = Profile((4, 8, 8), (16, 16)), Profile((4, 8, 8), (16, 16))
    of_frames.update(moments, PINNED.pair(images, images))
    clip = clips_of(images, 3)
    of_clips.update(moments.clips(3), PINNED.pair(clip, clip))
    one, other = of_frames.compute(), of_clips.compute()
    for name in ("mean", "std", "noise_std"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)
    for name, values in one["spectrum"].items():
        assert other["spectrum"][name] == pytest.approx(values, rel=1e-9)
    # nats of a clip are those of all its frames
    assert other["kl_nats_per_image"] == pytest.approx([3 * value for value in one["kl_nats_per_image"]], rel=1e-9)


def test_metrics_of_motion_are_of_clips() -> None:
    assert {"flicker", "temporal_l1"}.isdisjoint(default_names(alpha=False))
    assert {"flicker", "temporal_l1"} <= set(default_names(alpha=False, clips=True))
    with refused(UsageError, "flicker"):
        build_metrics(["psnr", "flicker"], CPU, 32)
    with refused(UsageError, "original, reconstruction"):
        measure(clips()[0, 0], clips()[0, 0])


@pytest.mark.parametrize("name", ["kid", "rfid"])
def test_sets_of_frames_count_frames(name: str) -> None:
    from ldm_vae.metrics.frechet import FrechetDistance
    from ldm_vae.metrics.kid import KernelDistance

    def features(pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (one[: pair.count].mean(dim=(2, 3)) for one in (pair.original, pair.reconstruction))
        return first, second

    metric = FrechetDistance(name, features, 3) if name == "rfid" else KernelDistance(name, features, 3)
    whole = FrechetDistance(name, features, 3) if name == "rfid" else KernelDistance(name, features, 3)
    original = clips(3, side=16)
    reconstruction = original * 0.9
    metric.update(PINNED.pair(original, reconstruction, [0, 1]))
    frames = [one[:2].transpose(1, 2).flatten(0, 1) for one in (original, reconstruction)]
    whole.update(PINNED.pair(*frames))
    found, expected = metric.compute(), whole.compute()
    assert found.n == expected.n == 2 * T
    assert found.mean == pytest.approx(expected.mean, rel=1e-6, abs=1e-9)


def test_only_the_pinned_protocol_is_of_clips() -> None:
    from store_sources import Footage

    from ldm_vae.metrics.batches import image_batches

    source = Footage(count=2)
    source.decoding = replace(source.decoding, frames=5)
    with refused(UsageError, "protocol"):
        next(image_batches(source, None, 16, batch_size=1, protocol=by_name("eq-vae")))
