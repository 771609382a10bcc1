"""The likelihood of a stored value against arithmetic of 60 digits, values and gradients: from the mean to 30
deviations and beyond, bins much wider and much narrower than a deviation, the outermost values with their tails."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.gaussian_nll import GaussianNLL as Term

DEVIATIONS = (0.0, 0.7, 3.0, 4.5, 9.0, 13.0, 30.0)


def exact(pixel: float, target: float, logvar: float, levels: int) -> tuple[float, float, float]:
    """Nats of the value, and their derivatives by the pixel and by the log-variance."""
    with mpmath.workdps(60):
        sigma, half = mpmath.exp(mpmath.mpf(logvar) / 2), mpmath.mpf(1) / (levels - 1)
        density = mpmath.npdf
        low = -mpmath.inf if target == -1 else (mpmath.mpf(target) - half - mpmath.mpf(pixel)) / sigma
        high = mpmath.inf if target == 1 else (mpmath.mpf(target) + half - mpmath.mpf(pixel)) / sigma
        mass = mpmath.ncdf(-low) - mpmath.ncdf(-high) if low > 0 else mpmath.ncdf(high) - mpmath.ncdf(low)
        ends = [(end, density(end)) for end in (low, high) if mpmath.isfinite(end)]
        signs = [1 if end == high else -1 for end, _ in ends]
        by_pixel = sum(sign * value for sign, (_, value) in zip(signs, ends, strict=True)) / sigma / mass
        by_logvar = sum(sign * end * value / 2 for sign, (end, value) in zip(signs, ends, strict=True)) / mass
        return float(-mpmath.log(mass)), float(by_pixel), float(by_logvar)


def found(term: Term, pixel: torch.Tensor, target: torch.Tensor) -> tuple[float, float, float]:
    pixel = pixel.clone().requires_grad_()
    nats = term(pixel[None], target[None])
    by_pixel, by_logvar = torch.autograd.grad(nats, (pixel, term.logvar))
    return nats.item(), by_pixel.item(), by_logvar.item()


@pytest.mark.parametrize("levels", [2, 256, 65_536])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.05, 1.0, 300.0])
def test_the_likelihood_of_a_value_is_exact_to_30_deviations(levels: int, sigma: float) -> None:
    term = GaussianNLL(logvar=2 * math.log(sigma), levels=levels).build()
    step = 2 / (levels - 1)
    for value in {0, levels // 2, levels - 1}:  # the first, one in the middle, the last
        target = torch.tensor(-1.0 if value == 0 else 1.0 if value == levels - 1 else -1 + value * step)
        for deviation in DEVIATIONS:
            for sign in (-1.0, 1.0):
                pixel = target + sign * deviation * sigma
                expected = exact(pixel.item(), target.item(), term.logvar.item(), levels)
                got = found(term, pixel, target)
                assert got[0] == pytest.approx(expected[0], abs=0.002, rel=1e-6)
                assert got[1] == pytest.approx(expected[1], rel=2e-3, abs=1e-5 / sigma)
                assert got[2] == pytest.approx(expected[2], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("logvar", [-80.0, -20.0, 0.0, 40.0])
@pytest.mark.parametrize("pixel", [0.0, 3.0, -1e4, 1e8, 1e15])
def test_no_output_and_no_variance_make_it_infinite(logvar: float, pixel: float) -> None:
    term = GaussianNLL(logvar=logvar, levels=256).build()
    targets = torch.tensor([[-1.0, 1 / 255, 1.0]])
    pixels = torch.full_like(targets, pixel).requires_grad_()
    nats = term(pixels, targets)
    if abs(pixel) * math.exp(-logvar / 2) < 1e17:  # its square is a number of fp32
        assert math.isfinite(nats.item())
        gradients = torch.autograd.grad(nats, (pixels, term.logvar))
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert not nats.isnan()
