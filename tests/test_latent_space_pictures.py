"""Walks and the mixture: ends, lengths and statistics that they must keep."""

from __future__ import annotations

import math

import pytest
import torch
from sentences import refused

from ldm_vae.core.errors import WorkError
from ldm_vae.latent_space import walks
from ldm_vae.latent_space.mixture import fit_mixture


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_both_ways_begin_and_end_at_the_images() -> None:
    start, end = drawn(2, 4, 8, 8)
    for path in (walks.linear, walks.spherical):
        frames = path(start, end)
        assert frames.shape == (walks.FRAMES, 4, 8, 8)
        torch.testing.assert_close(frames[0], start)
        torch.testing.assert_close(frames[-1], end)


def test_the_arc_keeps_the_length_and_the_line_cuts_through() -> None:
    start, end = drawn(2, 4, 32, 32)
    end = end * start.norm() / end.norm()
    middle = {
        path: path(start, end)[walks.FRAMES // 2].norm() / start.norm() for path in (walks.linear, walks.spherical)
    }
    assert middle[walks.spherical].item() == pytest.approx(1.0, abs=1e-9)
    assert middle[walks.linear].item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    # even steps of the angle
    arc = torch.nn.functional.normalize(walks.spherical(start, end).flatten(1), dim=1)
    angles = (arc[1:] * arc[:-1]).sum(dim=1).clamp(-1, 1).acos()
    assert angles.tolist() == pytest.approx([angles.mean().item()] * 8, rel=1e-6)
    torch.testing.assert_close(walks.spherical(start, 2 * start), walks.linear(start, 2 * start))


def test_a_traversal_moves_one_channel_only() -> None:
    z = drawn(3, 4, 4)
    frames = walks.traversal(z, 1, mean=5.0, std=2.0)
    assert (frames[:, [0, 2]] == z[[0, 2]]).all()
    torch.testing.assert_close(frames[:, 1] - z[1], torch.linspace(-6, 6, 9).double().view(-1, 1, 1).expand(9, 4, 4))
    one = walks.traversal(z[:, :1, :1], 1, mean=5.0, std=2.0)  # a vector gets the value itself
    assert one[:, 1, 0, 0].tolist() == pytest.approx(torch.linspace(-1, 11, 9).tolist())


def test_a_mixture_finds_its_components_and_keeps_the_variance() -> None:
    """Two clusters in 128 numbers, far apart along one direction, with fine noise everywhere."""
    side = torch.arange(200) % 2 * 2.0 - 1
    direction = torch.nn.functional.normalize(drawn(128, seed=1), dim=0).view(2, 8, 8)
    latents = 0.1 * drawn(200, 2, 8, 8) + 5 * side.view(-1, 1, 1, 1) * direction + 1.0
    mixture = fit_mixture(latents, 2, seed=0)
    new = mixture.sample(2000, seed=0).double()
    assert new.shape == (2000, 2, 8, 8)
    along = ((new - 1.0) * direction).sum(dim=(1, 2, 3))
    assert ((along.abs() - 5).abs() < 1).all()  # none in between, where one Gaussian would have most
    assert (along > 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert new.var().item() == pytest.approx(latents.var().item(), rel=0.1)
    across = new - along.view(-1, 1, 1, 1) * direction
    assert across.std(dim=0).mean().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(mixture.sample(3, seed=0), mixture.sample(3, seed=0))
    assert not torch.equal(mixture.sample(3, seed=0), mixture.sample(3, seed=1))


def test_few_latents_make_a_small_mixture_and_too_few_none() -> None:
    figures = fit_mixture(drawn(25, 4, 2, 2), 10, seed=0).figures()
    assert (figures["components"], figures["principal_components"]) == (2, 5)
    with refused(WorkError, "mixture"):
        fit_mixture(drawn(9, 4, 2, 2), 2, seed=0)
