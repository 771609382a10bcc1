"""The delta-VAE's rate: torch's KL between multivariate normals, and a floor that no posterior goes below."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.losses.kl_delta import kl_to_autoregressive


def moments(height: int, width: int) -> Moments:
    draw = torch.Generator().manual_seed(0)
    return Moments(*(torch.randn(2, 3, height, width, generator=draw, dtype=torch.float64) for _ in range(2)))


@pytest.mark.parametrize("correlation", [0.0, 0.7, -0.4])
def test_it_is_the_kl_to_an_autoregressive_gaussian(correlation: float) -> None:
    q = moments(2, 4)
    place = torch.arange(8, dtype=torch.float64)
    covariance = torch.tensor(correlation, dtype=torch.float64) ** (place[:, None] - place).abs()
    prior = MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance)
    posterior = MultivariateNormal(q.mean.flatten(2), torch.diag_embed(q.logvar.flatten(2).exp()))
    found = kl_to_autoregressive(q, correlation)
    torch.testing.assert_close(found.sum(dim=2), kl_divergence(posterior, prior))
    if correlation == 0.0:
        torch.testing.assert_close(found, q.kl().flatten(2))


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_no_posterior_is_nearer_than_delta(n: int) -> None:
    correlation = 0.6
    mean = torch.randn(1, 1, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logvar = torch.zeros(1, 1, 1, n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean, logvar], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        kl_to_autoregressive(Moments(mean, logvar), correlation).sum().backward()
        optimizer.step()
    least = kl_to_autoregressive(Moments(mean, logvar), correlation).sum().item()
    # each inner latent: variance (1 - a^2) / (1 + a^2) and log(1 + a^2) / 2 nats; the ends less, a single one nothing
    square = correlation**2
    delta = 0.0 if n == 1 else 0.5 * ((n - 2) * math.log1p(square) - math.log1p(-square))
    assert least == pytest.approx(delta, rel=1e-4, abs=1e-4)
    if n > 2:
        assert logvar[0, 0, 0, n // 2].exp().item() == pytest.approx((1 - 0.36) / (1 + 0.36), rel=1e-2)
