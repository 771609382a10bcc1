"""Statistics of latents: per-channel mean and variance in fp64, mergeable, with intervals over images.

For sampled latents z = mu + sigma * eps over images, channels' positions:

    m = E[mu],   v = E[sigma^2] + E[(mu - m)^2]           (law of total variance)

The state is one table of sums, so merging is addition; units are merged in unit order, which makes the result bit-equal
whoever computed them. Row 0 of the table is the plain sum, the others are Poisson bootstrap replicates: each image
counts Poisson(1) times, drawn by the image's own key (Chamandy et al., "Estimating uncertainty for massive data
streams", 2012), which is the bootstrap over images for data that is seen once and in any order. Of them the standard
errors are taken, not the percentiles (`ldm_vae.core.intervals` says why).

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.normalisation import Normalisation, NormalisationKind
from ldm_vae.core import config, intervals, rng
from ldm_vae.core.config import Section
from ldm_vae.core.errors import WorkError

REPLICATES = 200  # they know a standard error to 5 %

Array = npt.NDArray[np.float64]


class Intervals(Section):
    """Ends [low, high] of the 95 % intervals; of a vector [c] each end is one."""

    model_config = ConfigDict(strict=True)
    latents_mean: list[list[float]] = Field(min_length=2, max_length=2)
    latents_std: list[list[float]] = Field(min_length=2, max_length=2)
    scaling_factor: list[float] = Field(min_length=2, max_length=2)
    shift_factor: list[float] = Field(min_length=2, max_length=2)


class Measured(Section):
    """Statistics as JSON: per channel [c], over that many images and values of each channel."""

    model_config = ConfigDict(strict=True, extra="ignore")
    images: int = Field(gt=0)
    count: int = Field(gt=0)
    mean: list[float] = Field(min_length=1)
    variance: list[NonNegativeFloat]
    posterior_variance: list[NonNegativeFloat]
    scaling_factor: PositiveFloat | None
    """None: the latents do not vary, and nothing scales them to a variance of 1."""
    shift_factor: float
    latents_mean: list[float]
    latents_std: list[NonNegativeFloat]
    patch: int = Field(1, gt=0)
    ci95: Intervals | None = None

    @model_validator(mode="after")
    def _check(self) -> Measured:
        channels = [self.variance, self.posterior_variance, self.latents_mean, self.latents_std]
        if self.ci95 is not None:
            channels += [*self.ci95.latents_mean, *self.ci95.latents_std]
        if any(len(values) != len(self.mean) for values in channels):
            raise ValueError(f"expected one number for each of {len(self.mean)} channels")
        return self


class LatentStatistics:
    """Accumulates statistics of latents; `update` with batches, `merge` with others, then read the properties.

    sums [1 + REPLICATES, 2 + 3c] fp64, each row: images, positions, then per channel the sums of mu, mu^2, sigma^2.
    """

    def __init__(self, sums: Array | None = None, patch: int = 1) -> None:
        """patch: side of the squares of positions that become channels before anything is summed."""
        self.sums, self.patch = sums, patch
        self._intervals: Mapping[str, Any] | None = None

    # --- accumulating -------------------------------------------------------------------------------------------------

    def update(self, moments: Moments, keys: Sequence[int] | None = None) -> None:
        """Add moments [B, c, h, w]; `keys` identify the images (default: counted on from those seen so far)."""
        variance = moments.logvar.double().exp()
        self.update_values(moments.mean.double().cpu().numpy(), variance.cpu().numpy(), keys)

    def update_values(
        self, mean: npt.NDArray[Any], variance: npt.NDArray[Any] | None, keys: Sequence[int] | None = None
    ) -> None:
        """Add posterior means [B, c, h, w] and variances of the same shape (None: z itself was given)."""
        start = self.images
        mean, variance = patched(mean, self.patch), None if variance is None else patched(variance, self.patch)
        keys = range(start, start + len(mean)) if keys is None else keys
        # one row an image, then weighted sums over images: row 0 with weight 1, replicates with Poisson's
        rows = _image_sums(mean, variance)
        weights = np.hstack([np.ones((len(rows), 1)), _weights(keys)])
        self.add(np.einsum("br,bf->rf", weights, rows))  # not BLAS, whose sums depend on its number of threads

    def merge(self, other: LatentStatistics) -> None:
        """Add what another accumulator has seen; the two must not share images."""
        if other.sums is not None:
            self.add(other.sums)

    def add(self, sums: Array) -> None:
        """Add another accumulator's table of sums."""
        if self.sums is not None and self.sums.shape[1] != sums.shape[1]:
            raise ValueError(f"latents of {_channels(sums)} channels do not add to those of {_channels(self.sums)}")
        # statistics read back from JSON have no replicates: the sum keeps the rows that both have
        common = slice(None) if self.sums is None else slice(min(len(self.sums), len(sums)))
        self.sums = sums[common].copy() if self.sums is None else self.sums[common] + sums[common]
        self._intervals = None

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Latents seen (an image with several views counts once per view)."""
        return 0 if self.sums is None else int(self.sums[0, 0])

    @property
    def count(self) -> int:
        """Values per channel: images times positions."""
        return 0 if self.sums is None else int(self.sums[0, 1])

    @property
    def mean(self) -> torch.Tensor:
        """m [c], fp64."""
        return torch.from_numpy(_mean_variance(self._filled()[:1])[0][0])

    @property
    def variance(self) -> torch.Tensor:
        """v [c], fp64: of sampled latents, the posterior's own variance included."""
        return torch.from_numpy(_mean_variance(self._filled()[:1])[1][0])

    @property
    def posterior_variance(self) -> torch.Tensor:
        """E[sigma^2] [c], fp64: the part of v that sampling adds."""
        sums, channels = self._filled(), _channels(self._filled())
        return torch.from_numpy(sums[0, 2 + 2 * channels :] / sums[0, 1])

    def normalisation(self, kind: NormalisationKind) -> Normalisation:
        """The measured normalisation of that kind: `scale`, `shift` or `channel`."""
        return Normalisation.from_statistics(kind, self.mean, self.variance, self.patch)

    def gives(self, normalisation: Normalisation) -> bool:
        """True if this normalisation is the measured one of its kind, to what a config file keeps of it."""
        try:
            measured = self.normalisation(normalisation.kind).to_config()
        except WorkError:  # latents that do not vary
            return False
        # from JSON and from the sums, rounding differs
        return all(
            np.allclose(np.asarray(value, np.float64), np.asarray(measured[name], np.float64), rtol=1e-6, atol=1e-9)
            for name, value in normalisation.to_config().items()
            if value is not None
        )

    @property
    def intervals(self) -> Mapping[str, Any] | None:
        """95 % intervals [low, high] of mean, std, scaling_factor and shift_factor; None when they cannot be had: of
        fewer than `intervals.FEWEST` images, or without the replicates."""
        if self._intervals is not None or self.sums is None or len(self.sums) < 1 + REPLICATES:
            return self._intervals
        images = self._independent()
        if images < intervals.FEWEST:
            return None
        # each replicate's linear influence: on the means of mu, mu^2, sigma^2, then on m and v
        whole, replicates, channels = self.sums[0], self.sums[1:], _channels(self.sums)
        influence = (replicates[:, 2:] - replicates[:, 1:2] * (whole[2:] / whole[1])) / whole[1]
        mean, variance = (found[0] for found in _mean_variance(self.sums[:1]))
        first, second = influence[:, :channels], influence[:, channels : 2 * channels] + influence[:, 2 * channels :]

        error = partial(intervals.error_variance, images=images)
        mean_error, all_error = error(first), error(first.mean(axis=1))
        by_channel = intervals.of_variance(variance, mean_error, error(second - 2 * mean * first), images)
        scalar, scalar_influence = variance.mean() + mean.var(), (second - 2 * mean.mean() * first).mean(axis=1)
        low, high = intervals.of_variance(scalar, all_error, error(scalar_influence), images)
        if not all(np.isfinite(by_channel).all() and 0 < end < np.inf for end in (low, high)):
            return None  # latents that hardly vary
        return {
            "latents_mean": _interval(*intervals.of_mean(mean, mean_error, images)),
            "latents_std": _interval(*map(np.sqrt, by_channel)),
            "scaling_factor": _interval(1.0 / np.sqrt(high), 1.0 / np.sqrt(low)),
            "shift_factor": _interval(*intervals.of_mean(mean.mean(), all_error, images)),
        }

    def _independent(self) -> int:
        """Images behind the latents: several views of one have its key, so they are in a replicate together, and the
        replicates' numbers of latents vary by so much more."""
        sums = self._filled()
        # an image with v views weighs v latents at once: the variance of a replicate's number of latents is v times
        # that number
        views = round(float(np.square(sums[1:, 0] - sums[0, 0]).mean() / sums[0, 0]))
        return self.images // max(1, views)

    def _filled(self) -> Array:
        if self.sums is None or self.sums[0, 1] == 0:
            raise ValueError("no latents were seen: statistics do not exist yet")
        return self.sums

    # --- JSON ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything that a model card or an exporter needs, as plain JSON."""
        scale: float | None = None
        with contextlib.suppress(WorkError):  # constant latents: a result too, of images of one colour
            scale = self.normalisation("scale").scaling_factor
        return {
            "images": self.images,
            "count": self.count,
            "mean": self.mean.tolist(),
            "variance": self.variance.tolist(),
            "posterior_variance": self.posterior_variance.tolist(),
            "scaling_factor": scale,
            "shift_factor": float(self.mean.mean()),
            "latents_mean": self.mean.tolist(),
            "latents_std": self.variance.sqrt().tolist(),  # 0 of a dead channel
            "ci95": None if self.intervals is None else dict(self.intervals),
            "ci95_method": intervals.METHOD,
            **({} if self.patch == 1 else {"patch": self.patch}),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> LatentStatistics:
        """Rebuild from `to_json`; the replicates are not in it, so the intervals stay as they were until more is
        added. Raises UsageError for what is not that."""
        config.validate(Measured, tree, "statistics")
        mean, variance = np.asarray(tree["mean"], np.float64), np.asarray(tree["variance"], np.float64)
        posterior, count = np.asarray(tree["posterior_variance"], np.float64), float(tree["count"])
        squares = variance - posterior + mean**2
        sums = np.concatenate([[float(tree["images"]), count], mean * count, squares * count, posterior * count])
        statistics = cls(sums[None], int(tree.get("patch", 1)))
        statistics._intervals = intervals.recorded(tree)
        return statistics


def patched(values: npt.NDArray[Any], patch: int) -> npt.NDArray[Any]:
    """[B, c, h, w] => [B, c * p * p, h / p, w / p], of clips frame by frame."""
    if patch == 1:
        return values
    frames = torch.from_numpy(values).movedim(1, -3)  # where the channels are, also of clips [B, c, t, h, w]
    return torch.pixel_unshuffle(frames, patch).movedim(-3, 1).numpy()


def _image_sums(mean: npt.NDArray[Any], variance: npt.NDArray[Any] | None) -> Array:
    """One row per image [B, 2 + 3c]; each is summed by itself, so batching cannot change a bit."""
    batch, channels = mean.shape[:2]
    mu = np.ascontiguousarray(mean, dtype=np.float64).reshape(batch, channels, -1)
    rows = np.zeros((batch, 2 + 3 * channels))
    rows[:, 0], rows[:, 1] = 1.0, mu.shape[2]
    rows[:, 2 : 2 + channels] = mu.sum(axis=2)
    rows[:, 2 + channels : 2 + 2 * channels] = np.square(mu).sum(axis=2)
    if variance is not None:
        sigma2 = np.ascontiguousarray(variance, dtype=np.float64).reshape(mu.shape)
        rows[:, 2 + 2 * channels :] = sigma2.sum(axis=2)
    return rows


def _weights(keys: Sequence[int]) -> Array:
    """Number of times that each image counts in each replicate [B, REPLICATES], drawn by the image's key."""
    draws = [rng.generator(0, "bootstrap", int(key)).poisson(1.0, REPLICATES) for key in keys]
    return np.asarray(draws, dtype=np.float64).reshape(len(draws), REPLICATES)


def _channels(sums: Array) -> int:
    return int(sums.shape[1] - 2) // 3


def _mean_variance(sums: Array) -> tuple[Array, Array]:
    """m and v [rows, c] from rows of sums."""
    channels = _channels(sums)
    scaled = sums[:, 2:] / sums[:, 1:2]
    mean = scaled[:, :channels]
    # E[mu^2] - m^2, which rounding may leave slightly below 0 for a channel that never varies
    spread = scaled[:, channels : 2 * channels] - mean**2
    return mean, np.maximum(spread, 0.0) + scaled[:, 2 * channels :]


def _interval(low: Array, high: Array) -> list[Any]:
    return [low.tolist(), high.tolist()]
