"""Statistics of few images and of far-off means: bounds without a bias where the truth is known, and numbers that
do not change when a constant is added to what they do not depend on."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.export.preview import fit_preview
from ldm_vae.latent_space.channels import ChannelStatistics
from ldm_vae.latent_space.information import information
from ldm_vae.latent_space.spectrum import high_frequency_share, radial_power_spectrum
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.metrics.frechet import Gaussian
from ldm_vae.metrics.profile import Profile
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.running import Running
from ldm_vae.perceptual.ssim import ssim_maps
from ldm_vae.training.objective import ACTIVE, rate

FAR = (1_000.0, 10_000.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(moments: Moments, batch: int = 7) -> ChannelStatistics:
    found = ChannelStatistics(moments.mean.shape[1])
    for start in range(0, len(moments.mean), batch):
        rows = slice(start, start + batch)
        part = Moments(moments.mean[rows], moments.logvar[rows], moments.is_point)
        found.update(part, range(start, start + len(part.mean)))
    return found


# --- the gap to the prior, and the bound of the information that is made of it ----------------------------------------


@pytest.mark.parametrize(("positions", "alike"), [(1, False), (9, False), (9, True)])
def test_the_bias_of_the_gap_to_the_prior_is_taken_out(positions: int, alike: bool) -> None:
    """Paired: the same Gaussian data with the correction and without, so that their noise cancels; `alike`: all
    positions of an image are one, so that images alone are independent."""
    channels, images, trials, logvar = 6, 60, 40, -4.0
    noise = math.exp(logvar) * torch.eye(channels).double()
    differences = []
    for trial in range(trials):
        mean = drawn(images, channels, 1 if alike else positions, 1, seed=trial).expand(-1, -1, positions, -1)
        statistics = measured(Moments(mean, torch.full_like(mean, logvar)), images)
        rows = mean.transpose(0, 1).flatten(1)
        covariance = rows.cov(correction=0) + noise
        plain = 0.5 * (covariance.trace() + rows.mean(1).square().sum() - channels - torch.logdet(covariance))
        differences.append(float(plain) * positions - statistics.prior_gap)
    bias = channels * (channels + 3) / (4 * images) * (positions if alike else 1)
    assert float(np.mean(differences)) == pytest.approx(bias, rel=0.2)


def test_of_one_image_nothing_is_claimed() -> None:
    mean = drawn(1, 3, 2, 2)
    assert measured(Moments(mean, torch.full_like(mean, -20.0))).prior_gap == 0.0


def test_the_two_bounds_hold_the_information_of_few_images() -> None:
    """32 images, 4 channels: rate less the gap was below the truth by 0.22 nats before the bias was taken out."""
    images, channels, sigma = 32, 4, 0.7
    known = 0.5 * channels * math.log1p(sigma**-2)
    ends = []
    for trial in range(60):
        mean = drawn(images, channels, 1, 1, seed=trial)
        moments = Moments(mean, torch.full_like(mean, 2 * math.log(sigma)))
        found = information(moments, drawn(images, channels, 1, 1, seed=1000 + trial))
        ends.append((float(found.lower.mean()), float(found.rate.mean()) - measured(moments, images).prior_gap))
    lower, upper = np.mean(ends, axis=0)
    error = np.std(ends, axis=0) / math.sqrt(60)
    assert lower < known + 3 * error[0]
    assert abs(upper - known) < 3 * error[1] and error[1] < 0.06


def test_ranks_add_up_to_the_whole_one_without_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks as threads: each counts from a centre of its own, the second has seen nothing."""
    mean = drawn(30, 3, 4, 4).exp() + 100
    logvar = -1 + 0.5 * drawn(30, 3, 4, 4, seed=3)
    meeting, given, mine = threading.Barrier(3, timeout=60), [torch.empty(0)] * 3, threading.local()

    def gather(value: torch.Tensor) -> torch.Tensor:
        given[mine.rank] = value
        meeting.wait()
        everybody = torch.stack(given)
        meeting.wait()
        return everybody

    monkeypatch.setattr("ldm_vae.latent_space.channels.gather", gather)

    def rank(number: int, first: int, stop: int) -> ChannelStatistics:
        mine.rank, found = number, ChannelStatistics(3)
        for start in range(first, stop, 5):
            rows = slice(start, min(start + 5, stop))
            found.update(Moments(mean[rows], logvar[rows]), range(rows.start, rows.stop))
        return found.over_ranks()

    with ThreadPoolExecutor(3) as threads:
        ranks = list(threads.map(rank, range(3), (0, 18, 18), (18, 18, 30)))
    whole = measured(Moments(mean, logvar))
    for found in ranks:
        for name in ("mean", "std", "excess_kurtosis", "correlation", "kl"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
        assert found.prior_gap == pytest.approx(whole.prior_gap, rel=1e-9)


# --- a constant far from 0 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", FAR)
def test_a_dead_channel_is_dead_wherever_it_lies(offset: float) -> None:
    mean = torch.zeros(16, 4, 6, 6)
    mean[:, 0] = offset
    mean[:, 1] = offset + 0.02 * drawn(16, 6, 6).float()  # as much as fp32 can tell there
    mean[:, 2] = drawn(16, 6, 6, seed=1).float()
    mean[:, 3] = offset + drawn(16, 6, 6, seed=2).float()
    moments = Moments(mean, torch.full_like(mean, -4.0))
    logged = rate(moments, torch.zeros(16, 3, 24, 24))
    assert int(logged["active_units"]) == 2
    statistics = measured(moments)
    assert statistics.active.tolist() == [False, False, True, True]
    assert int(statistics.active.sum()) == int(logged["active_units"])
    assert float(statistics.signal_variance[0]) == pytest.approx(0.0, abs=0.01 * ACTIVE)


@pytest.mark.parametrize("offset", FAR)
def test_channels_do_not_change_with_their_mean(offset: float) -> None:
    """Kurtosis and correlations of z + 1,000 are those of z, to the digits that z + 1,000 has."""
    mean = drawn(40, 3, 4, 4).exp()
    mean[:, 1] -= 0.5 * mean[:, 0]
    logvar = -1 + 0.5 * drawn(40, 3, 4, 4, seed=3)
    near, far = measured(Moments(mean, logvar)), measured(Moments(mean + offset, logvar))
    for name in ("std", "signal_variance", "excess_kurtosis", "correlation"):
        torch.testing.assert_close(getattr(far, name), getattr(near, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", FAR)
def test_variances_and_spectra_do_not_change_with_a_constant(offset: float) -> None:
    x = drawn(12, 3, 12, 12)
    far = (x + offset).float()
    x = far.double() - offset  # what fp32 kept of it

    def store(values: torch.Tensor) -> torch.Tensor:
        statistics = LatentStatistics()
        statistics.update_values(values.numpy(), None)
        return statistics.variance

    def profile(values: torch.Tensor) -> list[float]:
        found = Profile((3, 12, 12), (24, 24))
        pictures = torch.zeros(12, 3, 24, 24)
        found.update(Moments.point(values), PINNED.pair(pictures, pictures))
        return [*found.compute()["std"], *found.compute()["spectrum"]["latents"]]

    def features(values: torch.Tensor) -> torch.Tensor:
        gaussian = Gaussian()
        for part in values.mean(dim=(2, 3)).split(5) if values.dtype == torch.float64 else ():
            gaussian.update(part)
        return gaussian.compute(3)[2]

    def running(values: torch.Tensor) -> float:
        found = Running()
        for part in values.flatten().split(100):
            found.update(part)
        return found.summary().std or 0.0

    for function in (store, profile, running, radial_power_spectrum, high_frequency_share):
        got, expected = (torch.as_tensor(function(values)).double() for values in (far, x))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(features(x + offset), features(x), rtol=1e-9, atol=1e-11)
    contrast = ssim_maps(far, far.flip(0), 1.0)[1]
    torch.testing.assert_close(contrast, ssim_maps(x, x.flip(0), 1.0)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", FAR)
def test_the_previews_share_of_variance_does_not_change_with_a_constant(offset: float) -> None:
    z, noise = drawn(6, 4, 5, 5), drawn(6, 3, 5, 5, seed=1)
    colours = z[:, :3] + 0.3 * noise
    near, far = (fit_preview([(z + shift, colours + shift)]) for shift in (0.0, offset))
    assert far.r2 == pytest.approx(near.r2, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1_000.0, 0.1])
def test_a_latent_that_never_varies_gives_numbers_and_no_texture(value: float) -> None:
    mean = torch.full((8, 2, 7, 5), value)
    mean[:, 1] = drawn(8, 7, 5).float()
    figures = measured(Moments.point(mean)).figures()
    assert all(math.isfinite(number) for number in figures["excess_kurtosis"])
    assert figures["correlation"] == [[1.0, 0.0], [0.0, 1.0]] and figures["std"][0] == pytest.approx(0.0, abs=1e-6)
    assert high_frequency_share(mean[:, :1]).tolist() == [0.0] * 8
    found = Profile((2, 7, 5), (24, 24))
    pictures = torch.zeros(8, 3, 24, 24)
    found.update(Moments.point(mean), PINNED.pair(pictures, pictures))
    assert all(math.isfinite(number) for number in found.compute()["std"])
