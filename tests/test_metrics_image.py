"""PSNR, SSIM and L1 against torchmetrics and scikit-image, and the protocol that they stand on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from ldm_vae.metrics import l1, psnr, ssim
from ldm_vae.metrics.protocol import PINNED, Protocol


def photographs(side: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A real photograph in four crops, uint8 [4, 3, side, side], and a blurred and noisy copy."""
    from skimage.data import astronaut

    image = torch.from_numpy(astronaut()).permute(2, 0, 1)
    corners = [(0, 150), (100, 100), (200, 300), (400, 20)]
    crops = torch.stack([image[:, top : top + side, left : left + side] for top, left in corners])
    small = torch.nn.functional.avg_pool2d(crops.float(), 2)
    blurred = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 6, blurred.shape).astype(np.float32))
    return crops, (blurred + noise).round().clamp(0, 255).to(torch.uint8)


def test_psnr_agrees_with_scikit_image_and_torchmetrics() -> None:
    original, other = photographs()
    ours = psnr.psnr(original, other)
    theirs = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(original, other, strict=True)
    ]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-9)
    per_image = torchmetrics_psnr(other.double(), original.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert ours.tolist() == pytest.approx(per_image.tolist(), abs=1e-4)


def test_identical_images_give_a_finite_psnr() -> None:
    original, _ = photographs()
    assert psnr.psnr(original, original).tolist() == [pytest.approx(100.0)] * 4


def test_ssim_agrees_with_scikit_image_and_torchmetrics() -> None:
    original, other = photographs()
    ours = ssim.ssim(original, other)
    theirs = [
        structural_similarity(
            a.permute(1, 2, 0).numpy(),
            b.permute(1, 2, 0).numpy(),
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(original, other, strict=True)
    ]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-6)
    # torchmetrics reflects the image at its border and averages over all of it; inside it is the same map
    _, whole = torchmetrics_ssim(other.double(), original.double(), data_range=255.0, return_full_image=True)
    inside = whole[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    assert ours.tolist() == pytest.approx(inside.tolist(), abs=1e-9)
    assert ssim.ssim(original, original).tolist() == pytest.approx([1.0] * 4)


def test_ssim_of_flat_images_is_defined() -> None:
    flat = torch.full((1, 3, 16, 16), 200.0)
    assert ssim.ssim(flat, flat).item() == pytest.approx(1.0)


def test_l1_counts_grey_levels() -> None:
    original = torch.zeros(2, 3, 4, 4)
    other = original.clone()
    other[1, :, :2] = 10
    assert l1.l1(original, other).tolist() == [0.0, 5.0]


def test_the_protocol_clamps_and_rounds() -> None:
    levels = torch.arange(256).float()
    assert torch.equal(PINNED.quantise(levels / 127.5 - 1), levels)
    assert PINNED.quantise(torch.tensor([-3.0, 7.0])).tolist() == [0.0, 255.0]
    between = torch.tensor([100.6 / 127.5 - 1, 100.4 / 127.5 - 1])
    assert PINNED.quantise(between).tolist() == [101.0, 100.0]
    assert Protocol("other", 1, rounding="truncate").quantise(between).tolist() == [100.0, 100.0]
    assert Protocol("other", 1, rounding="truncate_half_up").quantise(between).tolist() == [101.0, 100.0]


def test_values_of_padding_are_not_counted() -> None:
    original, other = (image.float() / 127.5 - 1 for image in photographs(32))
    metric = psnr.build()
    values = metric.update(PINNED.pair(original, other, indices=range(3)))
    summary = metric.compute()
    assert values.shape == (3,)
    assert summary.n == 3
    assert summary.mean == pytest.approx(values.mean().item())
    assert math.isfinite(summary.ci95[0]) and summary.ci95[0] < summary.mean < summary.ci95[1]
