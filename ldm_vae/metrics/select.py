"""Which metrics are measured: by name, with what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ldm_vae.errors import UsageError
from ldm_vae.metrics import l1, lpips, psnr, ssim
from ldm_vae.metrics.metric import Metric

NAMES = ("psnr", "ssim", "l1", "lpips_alex", "lpips_vgg")
VALIDATION = ("psnr", "ssim", "lpips_alex")  # what training watches: cheap, and one of each kind


def check(names: Sequence[str], resolution: int) -> None:
    """Raises UsageError for a name that does not exist and for a resolution below SSIM's window."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"metrics: unknown metric {name}; there are {', '.join(NAMES)}")
    if resolution < ssim.WINDOW:
        raise UsageError(f"resolution: SSIM's window needs at least {ssim.WINDOW} px, got {resolution}")


def build_metrics(
    names: Sequence[str], device: torch.device, resolution: int, *, lpips_weights: str | None = None
) -> list[Metric]:
    """The metrics of `names`, ready to update.

    Raises:
        UsageError: see `check`.
        WorkError: the weights of a network cannot be had.
    """
    check(names, resolution)
    build: dict[str, Callable[[], Metric]] = {
        "psnr": psnr.build,
        "ssim": ssim.build,
        "l1": l1.build,
        "lpips_alex": lambda: lpips.build("alex", device, lpips_weights),
        "lpips_vgg": lambda: lpips.build("vgg", device, lpips_weights),
    }
    return [build[name]() for name in NAMES if name in names]
