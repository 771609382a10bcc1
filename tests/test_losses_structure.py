"""Losses on structure: SSIM against scikit-image, focal frequency and Haar against their formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentences import refused
from skimage.metrics import structural_similarity

from ldm_vae.core.errors import UsageError
from ldm_vae.losses.focal_frequency import Config as FocalFrequency
from ldm_vae.losses.haar import Config as Haar
from ldm_vae.losses.ssim import Config as SSIM


def pair(size: tuple[int, int] = (24, 32)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, *size, generator=draw) * 2 - 1
    return (target + 0.4 * torch.randn(target.shape, generator=draw)).requires_grad_(), target


def test_ssim_is_scikit_images() -> None:
    pixels, target = pair()
    greys = [((images.detach() + 1) / 2).numpy() for images in (pixels, target)]
    found = [
        structural_similarity(
            x, y, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(*greys, strict=True)
    ]
    assert SSIM().build()(pixels, target).item() == pytest.approx(1 - np.mean(found), abs=1e-6)
    assert SSIM().build()(target, target).item() == pytest.approx(0.0, abs=1e-6)
    with refused(UsageError, "losses.ssim") as error:
        SSIM().build()(torch.zeros(1, 3, 16, 8), torch.zeros(1, 3, 16, 8))
    assert "11 px, got 8" in str(error.value)


def test_focal_frequency_is_the_papers_formula() -> None:
    pixels, target = pair()
    spectra = [np.fft.fft2(images.detach().double().numpy(), norm="ortho") for images in (pixels, target)]
    distance = np.abs(spectra[0] - spectra[1])
    for alpha in (1.0, 0.5):
        weight = distance**alpha
        weight /= weight.max(axis=(2, 3), keepdims=True)
        found = FocalFrequency(alpha=alpha).build()(pixels, target)
        assert found.item() == pytest.approx((weight * distance**2).mean(), rel=1e-5)
    squared = FocalFrequency(alpha=0.0).build()(pixels, target).item()
    assert squared == pytest.approx((pixels - target).square().mean().item(), rel=1e-5)
    # the weight has no gradient: each frequency pulls with twice its weighted error
    (gradient,) = torch.autograd.grad(FocalFrequency().build()(pixels, target), pixels)
    weight = distance / distance.max(axis=(2, 3), keepdims=True)
    expected = np.fft.ifft2(2 * weight * (spectra[0] - spectra[1]), norm="ortho").real / pixels.numel()
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-6 * np.abs(expected).max() * 100)
    # nothing to weigh: no NaN
    same = target.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(FocalFrequency().build()(same, target), same)
    assert not gradient.any()


def haar_matrix(size: int) -> np.ndarray:
    """One level: averages above, differences below."""
    half = np.eye(size // 2)
    return np.vstack([np.kron(half, [1, 1]), np.kron(half, [1, -1])]) / np.sqrt(2)


def test_haar_is_the_orthonormal_transform() -> None:
    pixels, target = pair()
    x = (pixels - target).detach().double().numpy()
    coefficients = x.copy()
    for level in range(3):
        rows, columns = 24 >> level, 32 >> level
        block = coefficients[:, :, :rows, :columns]
        coefficients[:, :, :rows, :columns] = haar_matrix(rows) @ block @ haar_matrix(columns).T
    assert np.square(coefficients).sum() == pytest.approx(np.square(x).sum())
    assert Haar(levels=3).build()(pixels, target).item() == pytest.approx(np.abs(coefficients).mean(), rel=1e-5)
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert Haar(levels=3).build()(flat, torch.zeros_like(flat)).item() == pytest.approx(0.5 * 8 / 64)  # one average
    with refused(UsageError, "losses.haar") as error:
        Haar().build()(torch.zeros(1, 3, 24, 12), torch.zeros(1, 3, 24, 12))
    assert "8 px, got 24 x 12" in str(error.value)
