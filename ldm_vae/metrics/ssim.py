"""Structural similarity (Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 2004): Gaussian window 11, sigma 1.5, range 255.

Computed per colour channel where the window fits inside the image, then averaged over channels and positions, as the
authors and scikit-image (`gaussian_weights=True, use_sample_covariance=False`) do. torchmetrics averages over a border
of reflected pixels too, which moves the mean by up to 0.007 on crops of 96 px.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import Pair

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim_maps(
    x: torch.Tensor, y: torch.Tensor, data_range: float | torch.Tensor = 255.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [B, C, H, W] => SSIM and its contrast-structure factor, each [B, C, H - 10, W - 10] in fp64.

    data_range: one for all, or [B, 1, 1, 1]. fp64, since E[x^2] - E[x]^2 cancels up to five digits.
    """
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    x, y = x.double(), y.double()
    moments = _blur(torch.cat([x, y, x * x, y * y, x * y], dim=1))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=1)
    covariance = xy - mean_x * mean_y
    variances = (xx - mean_x**2).clamp(min=0) + (yy - mean_y**2).clamp(min=0)
    contrast_structure = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * contrast_structure, contrast_structure


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of x [B, C, H, W], rows then columns, only where the window fits."""
    positions = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    weights = torch.exp(-(positions**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(x, weights[:, :, :, None], groups=x.shape[1])
    return F.conv2d(x, weights[:, :, None, :], groups=x.shape[1])


def ssim(x: torch.Tensor, y: torch.Tensor, data_range: float | torch.Tensor = 255.0) -> torch.Tensor:
    """x and y [B, C, H, W], H and W at least 11 => SSIM [B] in [-1, 1]."""
    return ssim_maps(x, y, data_range)[0].flatten(1).mean(dim=1)


def _measure(pair: Pair) -> torch.Tensor:
    return ssim(pair.original, pair.reconstruction)


def build() -> ImageMetric:
    return ImageMetric("ssim", "higher", _measure)
