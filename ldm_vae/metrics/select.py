"""Selection of metrics by name, with the networks that each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae.core.config import import_own
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import not_among
from ldm_vae.core.validation import first_line
from ldm_vae.data.decoding import Decoding
from ldm_vae.metrics import alpha as of_alpha
from ldm_vae.metrics import cmmd, delta_e, kid, l1, lpips, ms_ssim, psnr, sounds, ssim, temporal
from ldm_vae.metrics.frechet import FrechetDistance
from ldm_vae.metrics.metric import Metric, Unmeasured
from ldm_vae.metrics.protocol import PINNED, Protocol
from ldm_vae.metrics.titles import TITLES
from ldm_vae.perceptual import features
from ldm_vae.perceptual.ssim import WINDOW

NAMES = tuple(TITLES)


def default_names(alpha: bool, clips: bool = False, sample_rate: int | None = None) -> tuple[str, ...]:
    """All that can be measured of images or clips, with or without alpha, or of sounds."""
    if sample_rate is not None:
        return sounds.NAMES
    left_out = {*sounds.NAMES, *(() if alpha else of_alpha.NAMES), *(() if clips else temporal.NAMES)}
    return tuple(name for name in NAMES if name not in left_out)


def kind_of(decoding: Decoding) -> dict[str, Any]:
    """The signal that a source decodes, as keywords of `default_names` and `build_metrics`."""
    return {"alpha": decoding.alpha, "clips": decoding.frames is not None, "sample_rate": decoding.sample_rate}


@dataclass(frozen=True)
class Weights:
    """Files of networks that are found nowhere by themselves; None: look where `pretrained.py` looks, or go without."""

    lpips: str | None = None
    inception: Path | None = None
    dinov2: str | None = None
    clip: str | None = None


def check(
    names: Sequence[str], resolution: int, alpha: bool = False, clips: bool = False, sample_rate: int | None = None
) -> None:
    """Raises UsageError for a resolution below SSIM's window, and a name that is of another signal than `build_metrics`
    is told of."""
    check_names(names)
    for name in (name for name in names if "." not in name):
        if (name in sounds.NAMES) != (sample_rate is not None):
            expected = f"is of images; of sounds there are {', '.join(sounds.NAMES)}"
            raise UsageError(f"metrics: {name}: {'expected sounds' if sample_rate is None else expected}")
    if not alpha and (named := [name for name in names if name in of_alpha.NAMES]):
        raise UsageError(f"metrics: {named[0]}: expected images with alpha; `--alpha straight` says that they have it")
    if not clips and (named := [name for name in names if name in temporal.NAMES]):
        raise UsageError(f"metrics: {named[0]}: expected clips; `--frames N` reads videos as clips of N frames")
    if sample_rate is None and resolution < WINDOW and any("ssim" in name for name in names):
        raise UsageError(f"resolution: SSIM's window needs at least {WINDOW} px, got {resolution}")


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for a name that does not exist."""
    for name in names:
        if name not in NAMES and "." not in name:
            raise UsageError(f"metrics: {not_among(name, NAMES)}; a dotted path is a module of yours")


def build_metrics(
    names: Sequence[str],
    device: torch.device,
    resolution: int,
    *,
    weights: Weights = Weights(),  # frozen
    protocol: Protocol = PINNED,
    alpha: bool = False,
    clips: bool = False,
    sample_rate: int | None = None,
) -> list[Metric]:
    """The metrics of `names`, ready to update; one whose network is not there has a row that says so.

    Args:
        resolution: of images; of sounds the samples of an excerpt.
        alpha: the images have alpha.
        clips: they may have several frames.
        sample_rate: of sounds, in hertz; None: of images or clips.

    Raises:
        UsageError: see `check`; a module of somebody's own gives no metric.
        WorkError: the weights of a network that was named or that LPIPS needs cannot be had.
    """
    check(names, resolution, alpha, clips, sample_rate)
    per_image: dict[str, Callable[[], Metric]] = {
        "psnr": lambda: psnr.build(protocol),
        "ssim": lambda: ssim.build(protocol),
        "l1": l1.build,
        "delta_e": delta_e.build,
        "alpha_psnr": lambda: of_alpha.build("alpha_psnr"),
        "alpha_l1": lambda: of_alpha.build("alpha_l1"),
        "temporal_l1": lambda: temporal.build("temporal_l1"),
        "flicker": lambda: temporal.build("flicker"),
        "lpips_alex": lambda: lpips.build("alex", device, weights.lpips, protocol),
        "lpips_vgg": lambda: lpips.build("vgg", device, weights.lpips, protocol),
    }
    metrics: dict[str, Metric] = {name: build() for name, build in per_image.items() if name in names}
    if sample_rate is not None:
        metrics = {name: sounds.build(name, sample_rate, resolution) for name in sounds.NAMES if name in names}
    if "ms_ssim" in names:
        too_small = Unmeasured("ms_ssim", "higher", f"needs {ms_ssim.SMALLEST} px or more")
        metrics["ms_ssim"] = too_small if resolution < ms_ssim.SMALLEST else ms_ssim.build()

    if {"rfid", "kid"} & set(names):
        inception = None if weights.inception is None else features.inception(weights.inception, device)
        metrics["rfid"] = _frechet("rfid", inception, features.NOT_SUPPLIED)
        if inception is not None:
            metrics["kid"] = kid.KernelDistance("kid", inception, inception.dimensions)
    if "fd_dinov2" in names and weights.dinov2 is not None:
        metrics["fd_dinov2"] = _frechet("fd_dinov2", features.dinov2(weights.dinov2, device), "")
    if "cmmd" in names:
        metrics["cmmd"] = _cmmd(None if weights.clip is None else features.clip(weights.clip, device))
    if "fd_efflite0" in names:
        metrics["fd_efflite0"] = _frechet(
            "fd_efflite0", features.efflite0(device), "not installed: pip install 'ldm-vae[features]'"
        )
    own = [_own(name) for name in dict.fromkeys(names) if "." in name]
    return [metrics[name] for name in NAMES if name in names and name in metrics] + own


def _own(path: str) -> Metric:
    """The metric of a module of somebody's own, under the path of the module."""
    try:
        metric: Metric = import_own(path).build()
    except Exception as error:  # of somebody's own: whatever it does
        raise UsageError(f"metrics: {path}: expected a module with `build() -> Metric`: {first_line(error)}") from error
    if getattr(metric, "better", None) not in ("higher", "lower"):
        raise UsageError(f"metrics: {path}: expected `build() -> Metric` whose `better` is higher or lower")
    metric.name = path
    return metric


def _frechet(name: str, network: features.Features | None, absent: str) -> Metric:
    return Unmeasured(name, "lower", absent) if network is None else FrechetDistance(name, network, network.dimensions)


def _cmmd(network: features.Features | None) -> Metric:
    if network is None:
        return Unmeasured("cmmd", "lower", features.NOT_SUPPLIED)
    return cmmd.ClipDistance("cmmd", network, network.dimensions)
