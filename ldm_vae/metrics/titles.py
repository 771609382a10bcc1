"""Titles of metrics: heading, unit, decimals, and which direction is better. It needs no torch."""

from __future__ import annotations

import math
from typing import NamedTuple


class Title(NamedTuple):
    """heading and unit as a table shows them; decimals as many as the metric is worth; meaning in one sentence."""

    heading: str
    unit: str
    decimals: int
    better: str
    meaning: str


# by name in metrics.json, in the order of every table
TITLES = {
    "psnr": Title("PSNR", "dB", 2, "higher", "Squared error on a logarithmic scale; rewards blur over wrong detail."),
    "ssim": Title("SSIM", "", 4, "higher", "Agreement of local mean, contrast and structure; 1 is identical."),
    "ms_ssim": Title("MS-SSIM", "", 4, "higher", "SSIM over five scales."),
    "lpips_alex": Title("LPIPS alex", "", 4, "lower", "Distance in AlexNet's features; close to what people judge."),
    "lpips_vgg": Title("LPIPS vgg", "", 4, "lower", "The same in VGG-16's features, which training minimises."),
    "l1": Title("L1", "grey levels", 2, "lower", "Mean absolute error, of 255."),
    "delta_e": Title("ΔE 2000", "", 2, "lower", "Mean colour difference; 1 is just noticeable."),
    "rfid": Title("rFID", "", 3, "lower", "Fréchet distance in Inception features (2015-12-05)."),
    "kid": Title("KID", "× 1000", 3, "lower", "Kernel distance in Inception features, mean over random subsets."),
    "fd_dinov2": Title("FD DINOv2", "", 2, "lower", "Fréchet distance in DINOv2 features."),
    "cmmd": Title("CMMD", "", 3, "lower", "Kernel distance in CLIP's embeddings, times 1000 as published."),
    "fd_efflite0": Title(
        "FD EfficientNet-Lite0",
        "",
        3,
        "lower",
        "Fréchet distance in EfficientNet-Lite0 features; not an FID.",
    ),
}


def number(name: str, value: float) -> str:
    """A value with as many decimals as the metric is worth."""
    if not math.isfinite(value):
        return "-"
    title = TITLES.get(name)
    if title is None:
        return f"{value:.4g}"
    return f"{value * (1000 if title.unit == '× 1000' else 1):.{title.decimals}f}"


def heading(name: str) -> str:
    """Heading with its unit, such as PSNR (dB)."""
    title = TITLES[name]
    return f"{title.heading} ({title.unit})" if title.unit else title.heading
