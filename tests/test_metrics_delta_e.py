"""Colour differences: the published formula on known colours, and what it is for: a cast is not noise."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ldm_vae.metrics import select
from ldm_vae.metrics.delta_e import delta_e
from ldm_vae.metrics.psnr import psnr

CPU = torch.device("cpu")


def flat(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).view(1, -1, 1, 1).expand(-1, -1, 12, 12)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ((255, 0, 0), (0, 255, 0), 86.61),  # by published calculators of the formula
        ((255, 0, 0), (0, 0, 255), 52.88),
        ((128,), (128, 128, 128), 0.0),
        ((0,), (255,), 100.0),
    ],
)
def test_known_colours(one: tuple[float, ...], other: tuple[float, ...], difference: float) -> None:
    assert delta_e(flat(*one), flat(*other)).item() == pytest.approx(difference, abs=0.01)


def test_a_cast_is_seen_where_noise_of_its_size_is_not() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 100 + 80
    cast = image + torch.tensor([9.0, -9.0, 9.0]).view(1, 3, 1, 1)
    noise = image + 9 * torch.where(torch.rand_like(image[:, :1]) < 0.5, 1.0, -1.0)
    assert psnr(image, cast).item() == pytest.approx(psnr(image, noise).item(), abs=0.01)
    assert delta_e(image, cast) > 2 * delta_e(image, noise)


def test_without_its_library_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (metric,) = select.build_metrics(["delta_e"], CPU, 32)
    assert "features" in (metric.compute().note or "")
