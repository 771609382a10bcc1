"""Structural similarity (Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 2004): Gaussian window 11, sigma 1.5, range 255.

Computed per colour channel where the window fits inside the image, then averaged over channels and positions, as the
authors and scikit-image (`gaussian_weights=True, use_sample_covariance=False`) do. torchmetrics averages over a border
of reflected pixels too, which moves the mean by up to 0.007 on crops of 96 px.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim_maps(
    x: torch.Tensor,
    y: torch.Tensor,
    data_range: float | torch.Tensor = 255.0,
    window: Literal["gaussian", "uniform"] = "gaussian",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y [B, C, H, W] => SSIM and its contrast-structure factor, each [B, C, H - 10, W - 10] in fp64.

    data_range: one for all, or [B, 1, 1, 1]. fp64, since E[x^2] - E[x]^2 cancels up to five digits. The uniform window
    goes with the sample covariance, as in scikit-image's defaults.
    """
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    x, y = x.double(), y.double()
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y], dim=1), window).chunk(5, dim=1)
    sample = 1.0 if window == "gaussian" else WINDOW**2 / (WINDOW**2 - 1)
    covariance = sample * (xy - mean_x * mean_y)
    variances = sample * ((xx - mean_x**2).clamp(min=0) + (yy - mean_y**2).clamp(min=0))
    contrast_structure = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * contrast_structure, contrast_structure


def _blur(x: torch.Tensor, window: str) -> torch.Tensor:
    """Weighted means of x [B, C, H, W], along columns and then rows, only where the window fits."""
    positions = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    weights = torch.exp(-(positions**2) / (2 * SIGMA**2)) if window == "gaussian" else torch.ones_like(positions)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(x, weights[:, :, :, None], groups=x.shape[1])
    return F.conv2d(x, weights[:, :, None, :], groups=x.shape[1])


def ssim(x: torch.Tensor, y: torch.Tensor, data_range: float | torch.Tensor = 255.0) -> torch.Tensor:
    """x and y [B, C, H, W], H and W at least 11 => SSIM [B] in [-1, 1]."""
    return ssim_maps(x, y, data_range)[0].flatten(1).mean(dim=1)


def reflected_ssim(x: torch.Tensor, y: torch.Tensor, data_range: float | torch.Tensor) -> torch.Tensor:
    """The same with a reflected border, so that every pixel is the centre of a window, as torchmetrics has it."""
    border = [WINDOW // 2] * 4
    return ssim(F.pad(x, border, mode="reflect"), F.pad(y, border, mode="reflect"), data_range)


def uniform_ssim(x: torch.Tensor, y: torch.Tensor, data_range: float) -> torch.Tensor:
    """scikit-image's defaults with win_size 11: a uniform window and the sample covariance."""
    return ssim_maps(x, y, data_range, "uniform")[0].flatten(1).mean(dim=1)
