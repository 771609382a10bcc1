"""Channels, information and likelihood against what is known in closed form: moments of known distributions, a Gaussian
channel, and a linear-Gaussian VAE whose evidence and posterior are exact."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.latent_space.channels import ChannelStatistics
from ldm_vae.latent_space.information import information
from ldm_vae.latent_space.likelihood import (
    BIN,
    LikelihoodBounds,
    bits_per_dimension,
    dequantise,
    effective_samples,
    fitted_variance,
    importance_bounds,
    log_weight,
)
from ldm_vae.training.objective import rate


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- channels ---------------------------------------------------------------------------------------------------------


def moments(count: int = 40) -> Moments:
    """Three channels: one skewed far from 0, one that follows it, one that hardly varies."""
    first = drawn(count, 1, 4, 4).exp() + 20
    second = -0.5 * first + drawn(count, 1, 4, 4, seed=1)
    third = 0.05 * drawn(count, 1, 4, 4, seed=2)
    mean = torch.cat([first, second, third], dim=1)
    return Moments(mean, -1 + 0.5 * drawn(count, 3, 4, 4, seed=3))


def part(whole: Moments, rows: slice) -> Moments:
    return Moments(whole.mean[rows], whole.logvar[rows])


def test_channels_are_those_of_the_sampled_latents() -> None:
    whole = moments()
    found = ChannelStatistics(3)
    for start in range(0, 40, 7):
        rows = slice(start, min(start + 7, 40))
        found.update(part(whole, rows), range(rows.start, rows.stop))
    # many draws of the noise instead of its integral
    noise = torch.randn(1000, 40, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    z = (whole.mean + torch.exp(0.5 * whole.logvar) * noise).transpose(0, 2).flatten(1).numpy()
    assert found.mean.tolist() == pytest.approx(z.mean(axis=1), abs=0.01)
    assert found.std.tolist() == pytest.approx(z.std(axis=1), rel=0.01)
    expected = scipy.stats.kurtosis(z, axis=1)
    assert found.excess_kurtosis.tolist() == pytest.approx(expected, rel=0.05, abs=0.02)
    assert abs(found.correlation.numpy() - np.corrcoef(z)).max() < 0.01
    assert found.correlation.diag().tolist() == pytest.approx([1.0] * 3)
    # what training logs of the same
    logged = rate(whole, torch.zeros(40, 3, 8, 8))
    assert found.kl is not None
    assert found.kl.tolist() == pytest.approx(logged["kl_nats_per_channel"].tolist())
    assert found.active.tolist() == [True, True, False]
    assert int(found.active.sum()) == int(logged["active_units"])


def test_an_encoder_without_a_variance_has_no_kl() -> None:
    found = ChannelStatistics(2)
    found.update(Moments.point(drawn(8, 2, 2, 2)), range(8))
    figures = found.over_ranks().figures()
    assert figures["kl_nats_per_image"] is None and figures["posterior_std"] is None
    assert all(math.isfinite(value) for value in figures["excess_kurtosis"])


# --- information ------------------------------------------------------------------------------------------------------


def gaussian_channel(images: int, gain: float, sigma: float, values: int = 1) -> Moments:
    """q(z|x) = N(gain x, sigma^2) of x from N(0, I) in so many dimensions."""
    mean = gain * drawn(images, values, 1, 1)
    return Moments(mean, torch.full_like(mean, 2 * math.log(sigma)))


@pytest.mark.parametrize(("gain", "sigma", "values"), [(1.0, 0.5, 1), (0.8, 0.6, 2), (3.0, 1.0, 1)])
def test_the_information_of_a_gaussian_channel_lies_between_the_bounds(gain: float, sigma: float, values: int) -> None:
    found = information(gaussian_channel(2000, gain, sigma, values), drawn(2000, values, 1, 1, seed=9))
    exact = 0.5 * values * math.log1p((gain / sigma) ** 2)
    total = gain**2 + sigma**2  # the aggregate posterior's variance
    gap = 0.5 * values * (total - 1 - math.log(total))
    error = 3 * float(found.lower.std()) / math.sqrt(2000)
    assert float(found.lower.mean()) == pytest.approx(exact, abs=error + 0.01)
    assert float(found.lower.mean()) < float(found.upper.mean())
    assert float(found.upper.mean()) == pytest.approx(exact, abs=error + 0.05)
    figures = found.figures()
    assert figures["rate_nats"] == pytest.approx(exact + gap, abs=3 * float(found.rate.std()) / math.sqrt(2000))
    assert figures["prior_gap_nats"][0] - 0.1 <= gap <= figures["prior_gap_nats"][1] + 0.1
    assert not figures["saturated"]


def test_images_that_are_all_told_apart_saturate_the_estimate() -> None:
    found = information(gaussian_channel(300, 1.0, 1e-4, values=64), drawn(300, 64, 1, 1, seed=9))
    figures = found.figures()
    assert figures["saturated"]
    assert figures["mutual_information_nats"][0] == pytest.approx(math.log(300), abs=1e-6)
    assert figures["mutual_information_nats"][1] == figures["rate_nats"]  # the bound from the others is far above
    assert figures["prior_gap_nats"] == pytest.approx([0.0, figures["rate_nats"] - math.log(300)])
    assert bool((found.lower <= found.cap + 1e-9).all())


def test_a_collapsed_posterior_knows_nothing() -> None:
    same = Moments(torch.zeros(50, 3, 1, 1), torch.zeros(50, 3, 1, 1))
    found = information(same, drawn(50, 3, 1, 1))
    for values in (found.rate, found.lower, found.upper):
        assert values.tolist() == pytest.approx([0.0] * 50, abs=1e-12)


def test_the_gap_from_moments_is_below_the_gap_and_exact_for_a_gaussian() -> None:
    """At 2 x 2 positions that do not depend on each other; where they do, the true gap is larger."""
    values = 4000
    mixing = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    mean = torch.einsum("dc,bchw->bdhw", mixing, drawn(values, 2, 2, 2)) + 0.5
    logvar = torch.full_like(mean, -2.0)
    found = ChannelStatistics(2)
    found.update(Moments(mean, logvar), range(values))
    covariance = mixing @ mixing.T + math.exp(-2) * torch.eye(2, dtype=torch.float64)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    total = torch.distributions.MultivariateNormal(torch.full((2,), 0.5).double(), covariance)
    exact = 4 * float(torch.distributions.kl_divergence(total, prior))
    assert found.prior_gap == pytest.approx(exact, rel=0.03)
    informed = information(Moments(mean[:500], logvar[:500]), drawn(500, 2, 2, 2, seed=9))
    figures = informed.figures(found.prior_gap)
    assert figures["prior_gap_nats"][0] >= found.prior_gap
    assert figures["mutual_information_nats"][1] <= figures["rate_nats"] - found.prior_gap + 1e-9


# --- likelihood: probabilistic PCA (Tipping & Bishop 1999), of which everything is known ------------------------------


class LinearVAE:
    """x = W z + b + s e with orthogonal columns of W, so that the exact posterior is a diagonal Gaussian.

    `wrong` moves its mean and widens it, for bounds that are not tight.
    """

    dtype = torch.float64
    shape, latent, sigma = (1, 4, 4), 3, 0.3

    def __init__(self, wrong: float = 0.0) -> None:
        basis, _ = torch.linalg.qr(drawn(16, 3, seed=5))
        self.weight = basis * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        self.bias = 0.1 * drawn(16, seed=6)
        self.wrong = wrong

    def images(self, count: int) -> torch.Tensor:
        x = drawn(count, 3, seed=7) @ self.weight.T + self.bias + self.sigma * drawn(count, 16, seed=8)
        return x.view(count, *self.shape)

    def encode(self, pixels: torch.Tensor) -> Any:
        precision = 1 + (self.weight.T @ self.weight).diag() / self.sigma**2
        mean = (pixels.flatten(1) - self.bias) @ self.weight / self.sigma**2 / precision + self.wrong
        logvar = (-precision.log() + self.wrong).expand_as(mean)
        parameters = torch.cat([mean, logvar], dim=1)[:, :, None, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters))

    def decode(self, z: torch.Tensor) -> Any:
        return SimpleNamespace(sample=(z.flatten(1) @ self.weight.T + self.bias).view(-1, *self.shape))

    def evidence(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x), exact [B]."""
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(16, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(x.flatten(1))

    def log_weights(self, x: torch.Tensor, draws: int) -> torch.Tensor:
        posterior = Moments.from_parameters(self.encode(x).latent_dist.parameters)
        noise = drawn(draws, len(x), 3, 1, 1, seed=11)
        decoded = [self.decode(posterior.sample(eps)).sample for eps in noise]
        found = [log_weight(x, y, posterior, eps, self.sigma**2) for y, eps in zip(decoded, noise, strict=True)]
        return torch.stack(found, dim=1)


def test_with_the_exact_posterior_every_draw_weighs_the_evidence() -> None:
    vae = LinearVAE()
    x = vae.images(20)
    weights = vae.log_weights(x, 64)
    torch.testing.assert_close(weights, vae.evidence(x)[:, None].expand(20, 64), rtol=1e-10, atol=1e-8)
    for bound in importance_bounds(weights).values():  # the ELBO and the others: all tight
        torch.testing.assert_close(bound, vae.evidence(x), rtol=1e-10, atol=1e-8)
    assert effective_samples(weights).tolist() == pytest.approx([64.0] * 20)


def test_with_a_wrong_posterior_the_bounds_rise_towards_the_evidence() -> None:
    vae = LinearVAE(wrong=0.3)
    x = vae.images(400)
    bounds = importance_bounds(vae.log_weights(x, 64))
    exact = vae.evidence(x)
    elbo, some, many = (float(bounds[count].mean()) for count in (1, 16, 64))
    assert elbo < some < many
    assert bool((bounds[1] <= bounds[16] + 1e-9).all() and (bounds[16] <= bounds[64] + 1e-9).all())  # in each image
    error = float((bounds[64] - exact).std()) / math.sqrt(400)
    assert many <= float(exact.mean()) + 2 * error
    # the ELBO's gap is KL(q || posterior), the bound of 64 draws closes most of it
    posterior, guess = LinearVAE().encode(x).latent_dist.parameters, vae.encode(x).latent_dist.parameters
    (m, v), (mean, logvar) = posterior.chunk(2, dim=1), guess.chunk(2, dim=1)
    kl = 0.5 * ((logvar - v).exp() + (mean - m).square() / v.exp() - 1 - (logvar - v)).flatten(1).sum(dim=1)
    gap = float((exact - bounds[1]).mean())
    assert gap == pytest.approx(float(kl.mean()), abs=3 * float((exact - bounds[1] - kl).std()) / math.sqrt(400))
    assert float(exact.mean()) - many < 0.5 * gap


def test_the_fitted_variance_is_the_models() -> None:
    """E-step and M-step of probabilistic PCA agree: the expected error under the posterior is sigma^2."""
    vae = LinearVAE()
    x = vae.images(4000)
    posterior = Moments.from_parameters(vae.encode(x).latent_dist.parameters)
    decoded = vae.decode(posterior.sample(drawn(4000, 3, 1, 1, seed=12))).sample
    error = (x - decoded).square().flatten(1).mean(dim=1)
    three = 3 * float(error.std()) / math.sqrt(4000)
    assert fitted_variance(float(error.mean())) == pytest.approx(vae.sigma**2 + BIN**2 / 12, abs=three)


def test_bits_per_dimension_are_those_of_a_known_density() -> None:
    # uniform over all 256 bins costs 8 bits a value, whatever the number of values
    width = 256 * BIN
    nats = torch.tensor([-12 * math.log(width)], dtype=torch.float64)
    assert bits_per_dimension(nats, 12).item() == pytest.approx(8.0)


def test_dequantised_values_fill_their_bin_by_a_key() -> None:
    pixels = torch.full((4, 1, 32, 32), 200, dtype=torch.uint8)
    x = dequantise(pixels, range(4), 0)
    levels = (x + 1) * 127.5
    assert levels.min() >= 199.5 and levels.max() <= 200.5
    assert levels.mean().item() == pytest.approx(200, abs=0.02)
    assert levels.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert torch.equal(dequantise(pixels[:1], [2], 0)[0], x[2])


def test_bounds_do_not_depend_on_the_batches() -> None:
    vae = LinearVAE(wrong=0.3)
    pixels = ((vae.images(6) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    posterior = Moments.from_parameters(vae.encode(pixels / 127.5 - 1).latent_dist.parameters)
    found = []
    for size in (6, 2):
        bounds = LikelihoodBounds(0.1, repeats=2, seed=0)
        for start in range(0, 6, size):
            rows = slice(start, start + size)
            bounds.update(vae, pixels[rows], part(posterior, rows), range(start, start + size))
        found.append({name: summary.mean for name, summary in bounds.over_ranks().metrics().items()})
        figures = bounds.figures()
        assert figures["images"] == 6 and all(value > 0 for value in figures["spread_bits"].values())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0]["elbo_bits"] > found[0]["iwae_16_bits"] > found[0]["iwae_64_bits"]
