"""Titles of metrics: heading, unit, decimals, and which direction is better. It needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

OfSounds = Literal["si_sdr", "snr", "log_spectral_distance", "mel_distance", "stoi", "pesq"]
ValidationMetric = (
    Literal[
        "psnr", "ssim", "l1", "lpips_alex", "lpips_vgg", "delta_e", "alpha_psnr", "alpha_l1", "temporal_l1", "flicker"
    ]
    | OfSounds
)
"""Metrics that a validation in training may have: by networks that are found by themselves."""
OF_SOUNDS = get_args(OfSounds)
# by the signal, where nobody names any
USUAL = {
    **dict.fromkeys(("image", "video"), ("psnr", "ssim", "lpips_alex")),
    "audio": ("si_sdr", "snr", "mel_distance", "log_spectral_distance"),
}


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
    "alpha_psnr": Title("Alpha PSNR", "dB", 2, "higher", "Squared error of alpha on a logarithmic scale."),
    "alpha_l1": Title("Alpha L1", "grey levels", 2, "lower", "Mean absolute error of alpha, of 255."),
    "temporal_l1": Title(
        "Temporal difference", "grey levels", 2, "lower", "Mean absolute error of the difference of two frames, of 255."
    ),
    "flicker": Title(
        "Flicker", "grey levels", 2, "lower", "RMS change of the error from frame to frame; 0 for one that stays."
    ),
    "si_sdr": Title("SI-SDR", "dB", 2, "higher", "Signal to distortion of the best scale; blind to loudness."),
    "snr": Title("SNR", "dB", 2, "higher", "Signal to error, sample by sample."),
    "log_spectral_distance": Title(
        "Log-spectral distance", "dB", 2, "lower", "RMS difference of log spectra, mean over frames."
    ),
    "mel_distance": Title("Mel distance", "", 3, "lower", "Mean difference of log mel spectrograms of seven windows."),
    "stoi": Title("STOI", "", 3, "higher", "Intelligibility of speech; 1 is identical."),
    "pesq": Title("PESQ", "", 2, "higher", "Predicted opinion of speech, wideband, 1.04 to 4.64."),
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


def title(name: str, better: str = "") -> Title:
    """The title of a metric; of one of somebody's own, by the dotted path of its module, its last part."""
    return TITLES.get(name) or Title(name.rpartition(".")[2], "", 4, better, f"A metric of {name}.")


def measured(results: Sequence[Mapping[str, Any]]) -> dict[str, Title]:
    """Titles of the metrics that these results hold, in the order of every table, those of somebody's own last."""
    own = {
        name: title(name, str(summary.get("better", "")))
        for found in results
        for name, summary in found["metrics"].items()
        if name not in TITLES
    }
    return {name: TITLES[name] for name in TITLES if any(name in found["metrics"] for found in results)} | own


def number(name: str, value: float) -> str:
    """A value with as many decimals as the metric is worth."""
    if not math.isfinite(value):
        return "-"
    if name not in TITLES:
        return f"{value:.4g}"
    shown = TITLES[name]
    return f"{value * (1000 if shown.unit == '× 1000' else 1):.{shown.decimals}f}"


def amount(value: float) -> str:
    """A positive value with three digits, or all before the point: 0.00160, 7.23, 2,040."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def heading(name: str) -> str:
    """Heading with its unit, such as PSNR (dB)."""
    shown = title(name)
    return f"{shown.heading} ({shown.unit})" if shown.unit else shown.heading
