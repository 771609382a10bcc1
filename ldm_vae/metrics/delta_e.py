"""CIE delta E 2000: the colour difference that people see, mean over pixels; 1 is just noticeable, 2 to 3 at a glance.

Sharma, Wu & Dalal, "The CIEDE2000 color-difference formula", Color Research & Application 2005, as scikit-image has it:
sRGB, D65, kL = kC = kH = 1. PSNR weighs a green cast like noise; this does not.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from ldm_vae.data.alpha import three_channels
from ldm_vae.metrics.metric import ImageMetric, Metric, Unmeasured


def delta_e(original: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """original and reconstruction [B, C, H, W] on the 0..255 scale, C 1 or 3 => differences [B]."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    labs = [
        rgb2lab(three_channels(image.double()).permute(0, 2, 3, 1).cpu().numpy() / 255)
        for image in (original, reconstruction)
    ]
    return torch.from_numpy(np.asarray(deltaE_ciede2000(*labs))).flatten(1).mean(dim=1)


def build() -> Metric:
    """Build the metric; where scikit-image is not installed, a row that says so."""
    if importlib.util.find_spec("skimage") is None:
        return Unmeasured("delta_e", "lower", "not installed: pip install 'ldm-vae[features]'")
    return ImageMetric("delta_e", "lower", lambda pair: delta_e(pair.original, pair.reconstruction))
