"""Statistics: the two-pass formula, whatever the order and the batches, and intervals that cover."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.latent_store.format.statistics import LatentStatistics


def draw(images: int, seed: int = 0, offset: float = 3.0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn((images, 3, 4, 5), generator=generator) * torch.tensor([1.0, 2.0, 0.1]).view(3, 1, 1) + offset
    return Moments(mean, torch.randn((images, 3, 4, 5), generator=generator) - 2.0)


def part(moments: Moments, first: int, stop: int) -> Moments:
    return Moments(moments.mean[first:stop], moments.logvar[first:stop])


def test_it_is_the_law_of_total_variance() -> None:
    moments = draw(50)
    statistics = LatentStatistics()
    for first in range(0, 50, 7):
        statistics.update(part(moments, first, first + 7))
    mu, sigma2 = moments.mean.double(), moments.logvar.double().exp()
    mean = mu.mean(dim=(0, 2, 3))
    variance = sigma2.mean(dim=(0, 2, 3)) + (mu - mean.view(3, 1, 1)).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-12, atol=1e-12)
    assert (statistics.images, statistics.count) == (50, 1000)
    z = moments.mean + torch.exp(0.5 * moments.logvar) * torch.randn(moments.mean.shape)
    torch.testing.assert_close(z.double().var(dim=(0, 2, 3)), variance, rtol=0.15, atol=0.0)


def test_merging_in_the_same_order_is_exact_and_in_another_equal_to_rounding() -> None:
    moments = draw(40)
    units = []
    for first in (0, 10, 20, 30):
        statistics = LatentStatistics()
        statistics.update(part(moments, first, first + 10), keys=range(first, first + 10))
        units.append(statistics)

    def merged(order: list[int]) -> LatentStatistics:
        total = LatentStatistics()
        for unit in order:
            total.merge(units[unit])
        return total

    assert merged([0, 1, 2, 3]).to_json() == merged([0, 1, 2, 3]).to_json()
    torch.testing.assert_close(merged([3, 1, 0, 2]).variance, merged([0, 1, 2, 3]).variance, rtol=1e-13, atol=0.0)
    whole = LatentStatistics()
    whole.update(moments)
    torch.testing.assert_close(whole.variance, merged([0, 1, 2, 3]).variance, rtol=1e-13, atol=0.0)
    assert whole.intervals is not None
    np.testing.assert_allclose(whole.intervals["scaling_factor"], merged([0, 1, 2, 3]).intervals["scaling_factor"])


def test_json_there_and_back_and_on() -> None:
    statistics = LatentStatistics()
    statistics.update(draw(30))
    text = json.dumps(statistics.to_json())
    back = LatentStatistics.from_json(json.loads(text))
    assert back.intervals == statistics.intervals
    for kind in ("scale", "shift", "channel"):
        z = draw(1, seed=1).mean.double()
        torch.testing.assert_close(back.normalisation(kind).apply(z), statistics.normalisation(kind).apply(z))
    back.merge(statistics)
    assert back.images == 60 and back.intervals is None
    torch.testing.assert_close(back.variance, statistics.variance, rtol=1e-12, atol=0.0)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """400 data sets of 60 images with a common per-image offset: a bootstrap over pixels would cover far too seldom."""
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(400):
        mu = generator.standard_normal((60, 1, 1, 1)) + 0.1 * generator.standard_normal((60, 1, 4, 4))
        statistics = LatentStatistics()
        statistics.update_values(mu, None, keys=range(1000 * trial, 1000 * trial + 60))
        assert statistics.intervals is not None
        low, high = statistics.intervals["latents_mean"]
        inside += low[0] <= 0.0 <= high[0]
    assert 0.90 <= inside / 400 <= 0.98


def test_the_scale_makes_unit_variance() -> None:
    moments = draw(200)
    statistics = LatentStatistics()
    statistics.update(moments)
    z = moments.sample(torch.randn(moments.mean.shape))
    for kind in ("shift", "channel"):
        latents = statistics.normalisation(kind).apply(z)
        assert float(latents.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(latents.var()) == pytest.approx(1.0, abs=0.05)
    assert float(statistics.normalisation("scale").apply(z).var()) == pytest.approx(1.0, abs=0.05)


def test_no_latents_and_other_channels_are_errors() -> None:
    with pytest.raises(ValueError, match="no latents were seen"):
        LatentStatistics().to_json()
    statistics = LatentStatistics()
    statistics.update(draw(2))
    with pytest.raises(ValueError, match="latents of 4 channels do not add to those of 3"):
        statistics.update_values(np.zeros((1, 4, 2, 2)), None)
