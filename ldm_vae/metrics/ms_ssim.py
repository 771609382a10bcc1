"""Multi-scale structural similarity (Wang, Simoncelli & Bovik, Asilomar 2003): five scales, for images above 160 px.

Contrast and structure at every scale, luminance at the coarsest only; each scale halves the image by averaging 2 x 2.
As in torchmetrics, the coarsest scale has a reflected border (at 176 px it is one window large) and negative factors
count as 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import Pair
from ldm_vae.perceptual.ssim import WINDOW, reflected_ssim, ssim_maps

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST = (WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1  # 161: the window must fit into the coarsest scale


def ms_ssim(x: torch.Tensor, y: torch.Tensor, data_range: float = 255.0) -> torch.Tensor:
    """x and y [B, C, H, W], H and W at least SMALLEST => MS-SSIM [B] in [0, 1]."""
    x, y = x.double(), y.double()
    product = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    for weight in WEIGHTS[:-1]:
        contrast_structure = ssim_maps(x, y, data_range)[1].flatten(1).mean(dim=1)
        product = product * contrast_structure.clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product * reflected_ssim(x, y, data_range).clamp(min=0) ** WEIGHTS[-1]


def _measure(pair: Pair) -> torch.Tensor:
    return ms_ssim(pair.original, pair.reconstruction)


def build() -> ImageMetric:
    return ImageMetric("ms_ssim", "higher", _measure)
