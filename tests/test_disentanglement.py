"""The mutual information gap of constructed encoders against its closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.latent_space.disentanglement import entropies, information_gaps, mutual_information, rotated

POINT = -30.0


def gaps(mean: torch.Tensor, factors: torch.Tensor, p: torch.Tensor, logvar: float = POINT) -> torch.Tensor:
    moments = Moments(mean.double(), torch.full_like(mean, logvar, dtype=torch.float64))
    return information_gaps(mutual_information(moments, factors, p), entropies(factors, p))


def space(*sizes: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def test_a_code_that_is_the_factors_has_gap_one() -> None:
    factors = space(3, 2, 4)
    tables = [torch.tensor(own).double() for own in ((0.5, 0.3, 0.2), (0.9, 0.1), (0.4, 0.3, 0.2, 0.1))]
    p = torch.stack([own[column] for own, column in zip(tables, factors.T, strict=True)]).prod(dim=0)
    entropy = entropies(factors, p)
    torch.testing.assert_close(entropy, torch.stack([-(own * own.log()).sum() for own in tables]))
    mean = factors[:, [2, 0, 1]].double() * torch.tensor([1.0, -3.0, 0.01])
    mean = torch.cat([mean, torch.zeros(len(mean), 1)], dim=1)  # and a dimension that carries nothing
    information = mutual_information(Moments(mean, torch.full_like(mean, POINT)), factors, p)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[0, 2], expected[1, 0], expected[2, 1] = entropy[2], entropy[0], entropy[1]
    torch.testing.assert_close(information, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(gaps(mean, factors, p), torch.ones(3).double(), atol=1e-9, rtol=0)


def test_gaps_of_codes_that_share_factors_are_their_closed_form() -> None:
    factors, p = space(2, 2), torch.full((4,), 0.25)
    first, second = factors.T.double()
    # rotated by 45 degrees: each of both dimensions has 1.5 bits less 1 bit of either factor
    turned = torch.stack([first + second, first - second], dim=1)
    information = mutual_information(Moments(turned, torch.full_like(turned, POINT)), factors, p)
    torch.testing.assert_close(information, torch.full((2, 2), 0.5 * math.log(2)).double(), atol=1e-9, rtol=0)
    assert gaps(turned, factors, p).tolist() == pytest.approx([0, 0], abs=1e-9)
    # the second dimension tells both factors: nothing is left of the first one's gap
    mixed = torch.stack([first, first + 2 * second], dim=1)
    assert gaps(mixed, factors, p).tolist() == pytest.approx([0, 1], abs=1e-9)
    assert gaps(mixed[:, 1:], factors, p).tolist() == pytest.approx([1, 1], abs=1e-9), "nothing to subtract"


def test_noise_takes_its_part_and_a_rotation_lowers_the_gap() -> None:
    """One bit through a Gaussian channel against an adaptive integral; then both at angles from 0 to 45 degrees."""
    factors, sigma = space(2, 2), 0.7
    p = torch.full((4,), 0.25)
    mean = 2.0 * factors.double() - 1.0

    def integrand(z: float) -> float:
        on, off = (math.exp(-0.5 * ((z - at) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi) for at in (1, -1))
        return on * math.log(2 * on / (on + off)) if on > 0 else 0.0

    expected = integrate.quad(integrand, -8, 8, epsabs=1e-12)[0]
    logvar = 2 * math.log(sigma)
    moments = Moments(mean, torch.full_like(mean, logvar))
    information = mutual_information(moments, factors, p)
    torch.testing.assert_close(information, expected * torch.eye(2).double(), atol=1e-9, rtol=0)
    found = []
    for degrees in (0, 15, 30, 45):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turned = rotated(moments, torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
        torch.testing.assert_close(turned.logvar, moments.logvar)  # equal noise stays what it is
        found.append(float(information_gaps(mutual_information(turned, factors, p), entropies(factors, p)).mean()))
    assert found[0] > found[1] > found[2] > found[3] == pytest.approx(0, abs=1e-9)
    assert found[0] == pytest.approx(expected / math.log(2), abs=1e-9)


def test_a_quarter_turn_of_unequal_noise_swaps_the_dimensions() -> None:
    moments = Moments(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[-1.0, 3.0]]).double())
    turned = rotated(moments, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double())
    torch.testing.assert_close(turned.mean, torch.tensor([[2.0, -1.0]]).double())
    torch.testing.assert_close(turned.logvar, torch.tensor([[3.0, -1.0]]).double())


def test_factors_that_are_not_independent_do_not_trouble_it() -> None:
    """Three of four cells: the conditional distributions are those of the cells that exist."""
    factors, p = space(2, 2)[:3], torch.tensor([0.5, 0.25, 0.25])
    information = mutual_information(
        Moments(factors.double(), torch.full((3, 2), POINT, dtype=torch.float64)), factors, p
    )
    joint = torch.tensor([[0.5, 0.25], [0.25, 0.0]]).double()
    both = float(torch.special.xlogy(joint, joint / joint.sum(1, keepdim=True) / joint.sum(0)).sum())
    assert information[0, 1] == pytest.approx(both, abs=1e-9) == float(information[1, 0])
    torch.testing.assert_close(information.diag(), entropies(factors, p), atol=1e-9, rtol=0)
