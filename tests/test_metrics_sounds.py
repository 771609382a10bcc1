"""Metrics of sounds: closed forms, torchmetrics, sounds without a number, and the names of each signal."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from sentences import refused
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio, signal_noise_ratio

from ldm_vae import measure
from ldm_vae.core.errors import UsageError
from ldm_vae.losses.multi_scale_mel import Config as Mel
from ldm_vae.metrics import sounds
from ldm_vae.metrics.evaluate import Worst
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.select import build_metrics, default_names
from ldm_vae.metrics.titles import TITLES

RATE = 16_000


def noise(count: int = 3, channels: int = 2, length: int = 8192, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, length, generator=torch.Generator().manual_seed(seed)) * 0.2


def speech(seconds: float = 2.0) -> torch.Tensor:
    """A buzz of 120 Hz through three formants, in syllables: enough of speech for STOI and PESQ."""
    time = torch.arange(int(RATE * seconds)) / RATE
    formants = sum(torch.sin(2 * math.pi * one * time) for one in (500.0, 1500.0, 2500.0))
    buzz = (torch.sin(2 * math.pi * 120 * time) > 0.9) * formants
    return (0.3 * buzz * (torch.sin(2 * math.pi * 3 * time) > -0.3)).view(1, 1, -1)


def value(name: str, original: torch.Tensor, reconstruction: torch.Tensor) -> list[float]:
    found: list[float] = measure(original, reconstruction, metrics=[name], sample_rate=RATE)[name].tolist()
    return found


def test_ratios_are_torchmetrics() -> None:
    x, y = noise(), 0.7 * noise() + 0.1 * noise(seed=1)
    for name, theirs in (("si_sdr", scale_invariant_signal_distortion_ratio), ("snr", signal_noise_ratio)):
        assert value(name, x, y) == pytest.approx(theirs(y.double(), x.double()).mean(dim=1).tolist(), rel=1e-6)


def test_ratios_of_a_known_error() -> None:
    x = noise(1, 1)
    other = noise(1, 1, seed=1).double()
    orthogonal = other - (other * x).sum() / x.double().square().sum() * x
    error = orthogonal * x.double().norm() / orthogonal.norm() * 10 ** (-15 / 20)  # 15 dB below
    assert value("snr", x.double(), x + error) == pytest.approx([15])
    assert value("si_sdr", x.double(), 0.1 * (x + error)) == pytest.approx([15])  # of any loudness
    assert value("snr", x, 0.5 * x) == pytest.approx([20 * math.log10(2)])
    for name in ("snr", "si_sdr"):
        assert value(name, x, x) == value(name, 0 * x, 0 * x) == [100.0]
        assert value(name, 0 * x, x) == [-100.0]
    assert value("si_sdr", x, 0 * x) == [-100.0] and value("snr", x, 0 * x) == [0.0]


def test_distances_of_a_gain_are_its_decibels() -> None:
    x = noise()
    assert value("log_spectral_distance", x, 0.5 * x) == pytest.approx([20 * math.log10(2)] * 3, rel=1e-4)
    assert value("log_spectral_distance", x, x) == value("mel_distance", x, x) == [0.0] * 3
    silence = 0 * x
    assert value("log_spectral_distance", silence, silence) == [0.0] * 3
    # of five bands of a window of 32 samples no gain is lost in the floor
    assert value("mel_distance", x, 0.5 * x)[0] == pytest.approx(7 * math.log10(2), rel=0.05)
    terms = [Mel(sample_rate=RATE).build()(one[None], other[None]) for one, other in zip(x, noise(seed=1), strict=True)]
    assert value("mel_distance", x, noise(seed=1)) == pytest.approx([one.item() for one in terms], rel=1e-5)


def test_stoi_and_pesq_know_speech_and_noise() -> None:
    x = speech()
    worse, worst = (x + level * noise(1, 1, x.shape[2]) for level in (0.05, 1.0))
    for name, perfect in (("stoi", 1.0), ("pesq", 4.64)):
        found = [value(name, x, y)[0] for y in (x, worse, worst)]
        assert found[0] == pytest.approx(perfect, abs=0.01) and found[0] > found[1] > found[2]
        both = torch.cat([x, x], dim=1), torch.cat([x, worst], dim=1)
        assert value(name, *both) == pytest.approx([(found[0] + found[2]) / 2], rel=1e-6)


@pytest.mark.parametrize("name", ["stoi", "pesq"])
def test_a_sound_without_speech_is_left_out(name: str) -> None:
    x = speech()
    batch = torch.cat([x, 0 * x, x])
    (metric,) = build_metrics([name], torch.device("cpu"), 0, sample_rate=RATE)
    values = metric.update(PINNED.pair(batch, batch))
    assert values is not None and values.isnan().tolist() == [False, True, False]
    assert metric.compute().n == 2 and metric.compute().mean == pytest.approx(values[0].item())
    worst: Any = Worst([metric])
    worst.update([5, 6, 7], {name: values})
    assert [index for index, _ in worst.compute()] == [5, 7]
    worst = Worst([metric])  # they take no place of those that have a number
    worst.update(range(13), {name: torch.tensor([*range(1, 11), *[math.nan] * 3], dtype=torch.float64)})
    assert [index for index, _ in worst.compute()] == [*range(10)]
    (none,) = build_metrics([name], torch.device("cpu"), 0, sample_rate=RATE)
    none.update(PINNED.pair(0 * x, 0 * x))
    assert none.compute().mean is None and str(none.compute()) == "no sound that it can measure"
    short = speech(0.05)
    assert math.isnan(value(name, short, short)[0])


def test_intervals_are_those_of_the_others_and_padding_does_not_count() -> None:
    x, y = noise(4), noise(4) + 0.1 * noise(4, seed=1) * torch.tensor([1.0, 2.0, 3.0, 9.0]).view(4, 1, 1)
    (metric,) = build_metrics(["snr"], torch.device("cpu"), 0, sample_rate=RATE)
    metric.update(PINNED.pair(x, y, indices=range(3)))
    each = value("snr", x, y)[:3]
    found = metric.compute()
    assert found.n == 3 and found.mean == pytest.approx(sum(each) / 3)
    half = 4.30265 * torch.tensor(each).std().item() / math.sqrt(3)
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half), rel=1e-4)


def test_each_signal_has_its_names() -> None:
    assert {*sounds.NAMES} <= {*TITLES} and {*sounds.NAMES}.isdisjoint(default_names(True, True))
    built = build_metrics(sounds.NAMES, torch.device("cpu"), 8192, sample_rate=RATE)
    assert [one.name for one in built] == [*sounds.NAMES]
    assert all(one.better == TITLES[one.name].better for one in built)
    x = noise()
    with refused(UsageError, "si_sdr"):
        build_metrics(["psnr", "si_sdr"], torch.device("cpu"), 32)
    with refused(UsageError, "psnr"):
        measure(x, x, sample_rate=RATE)
    for one, other, rate in ((x, x, None), (x, x[:, :, 1:], RATE), (x[..., None], x[..., None], RATE)):
        with refused(UsageError, "original, reconstruction"):
            measure(one, other, metrics=["snr"], sample_rate=rate)
    with refused(UsageError, "original, reconstruction"):
        measure(x, x * math.nan, metrics=["snr"], sample_rate=RATE)
    with refused(UsageError, "metrics: log_spectral_distance"):
        measure(x[..., :1024], x[..., :1024], metrics=["log_spectral_distance"], sample_rate=RATE)


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = {"pystoi", "pesq", "torchaudio"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    for metric in build_metrics(["stoi", "pesq", "mel_distance"], torch.device("cpu"), 0, sample_rate=RATE):
        assert str(metric.compute()) == "not installed: pip install 'ldm-vae[audio,speech]'"


def test_bits_per_second_are_those_of_published_codecs() -> None:
    assert sounds.bits_per_second(24_000, 320, [1024] * 8) == 6000  # EnCodec
    assert sounds.bits_per_second(44_100, 512, [1024] * 9) == pytest.approx(7752, abs=1)  # Descript Audio Codec
    assert sounds.bits_per_second(24_000, 320, []) == 0
