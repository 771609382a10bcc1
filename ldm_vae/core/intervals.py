"""95 % intervals by Student's t, of means and of variances, that hold at a handful of images too. It needs no torch.

A percentile bootstrap of a variance covers 55 to 85 % at 9 images, and 15 to 45 % at 2: it can see nothing further out
than the images at hand. Here the standard error of log v is that of each image's linear influence, the centre is free
of the bias of log v to first order, and the quantile is Student's with half the degrees of freedom: squares are skewed,
so their own deviation is worth no more (`tests/test_store_intervals.py` simulates it: 90 % from 5 images on).

Legend: R bootstrap replicates, N independent images, ... any shape of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

METHOD = "student-t"  # stands beside ci95; without it an older version took percentiles
FEWEST = 5  # images below which no interval is given: at 4 a variance is known to a factor of ten at best
ENOUGH = 100  # images from which an older version's percentiles are shown: they cover 90 % there
Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def t95(freedom: float) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5); within 0.5 % from 2 degrees of freedom on."""
    exact = {1: 12.7062, 2: 4.30265, 3: 3.18245}
    if freedom in exact:
        return exact[int(freedom)]
    z, v = Z95, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def error_variance(influence: Array, images: int) -> Array:
    """Squared standard error [...] of an estimate from its linear part in each Poisson replicate [R, ...].

    Its expectation is 0 and its variance sum d_i^2 / N^2 with d_i an image's deviation from the mean: N - 1 of N.
    """
    found: Array = np.square(influence).mean(axis=0) * images / (images - 1)
    return found


def of_mean(value: Array, squared_error: Array, images: int) -> tuple[Array, Array]:
    """Ends of the interval of a mean over images, each [...]."""
    half = t95(images - 1) * np.sqrt(squared_error)
    return value - half, value + half


def of_variance(value: Array, mean_error: Array, squared_error: Array, images: int) -> tuple[Array, Array]:
    """Ends of the interval of a variance v = E[x^2] - E[x]^2, each [...]; 0 of one that is 0.

    Args:
        value: v as estimated.
        mean_error: squared standard error of the mean, which is what v lacks: E[v] = var - it.
        squared_error: of v.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = squared_error / np.square(value)
        # E[log v] is half the squared error below log E[v]
        centre, half = np.log(value + mean_error) + 0.5 * spread, t95(0.5 * (images - 1)) * np.sqrt(spread)
        low, high = np.minimum(np.exp(centre - half), value), np.maximum(np.exp(centre + half), value)
    known = value > 0
    return np.where(known, low, 0.0), np.where(known, high, 0.0)


# --- as they are recorded ---------------------------------------------------------------------------------------------


def recorded(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`ci95` of statistics as JSON; None where there is none, or where it is an older version's of few images."""
    good = tree.get("ci95_method") == METHOD or tree["images"] >= ENOUGH
    found: Mapping[str, Any] | None = tree.get("ci95")
    return found if good else None


def why_none(images: int) -> str:
    """The reason why statistics of so many images have no interval, for a reader."""
    if images < FEWEST:
        return f"no 95 % interval: it takes {FEWEST} images"
    return "no 95 % interval: none was recorded that covers as often as it says"
