"""Bounds of an image's likelihood under the decoder: the evidence lower bound and the importance-weighted ones.

p(x|z) is a Gaussian per pixel value around the decoded image, clamped to [-1, 1], with one variance for all (a decoder
trained on masses of values owns nothing beyond the ends of the range); p(z) = N(0, I). With
w = p(x|z) p(z) / q(z|x) and K draws from q(z|x) (Burda et al., "Importance weighted autoencoders", ICLR 2016):

    E log w  =  ELBO  <=  E log 1/K sum_k w_k  <=  log p(x),        rising with K

Stored images have 256 levels; u is uniform noise that fills a level's bin of width 1 / 127.5 in [-1, 1], which makes a
density of continuous x a bound of the stored image's probability (Theis et al., ICLR 2016):

    bits per dimension = -log p(x) / (C H W ln 2) + log2(127.5)

Legend: B batch, C image channels, H W pixels, c latent channels, h w latent positions, K importance samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.core import rng
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.running import Running, Summary

BIN = 1 / 127.5  # the distance of two of 256 levels in [-1, 1]
SAMPLES = (1, 16, 64)  # K: each divides the last


def dequantise(pixels: torch.Tensor, indices: Sequence[int], seed: int) -> torch.Tensor:
    """uint8 [B, C, H, W] => x in [-1, 1] and half a bin beyond, fp64: each value anywhere in its bin, drawn by the
    image's index."""
    draws = [rng.generator(seed, "dequantise", int(index)).random(tuple(pixels.shape[1:])) for index in indices]
    return (pixels.double() + torch.from_numpy(np.stack(draws)) - 0.5) * BIN - 1


def squared_error(pair: Pair) -> torch.Tensor:
    """Mean squared error of each image or frame in [-1, 1], fp64."""
    return (pair.raw_reconstruction.double() - pair.raw_original.double()).square().flatten(1).mean(dim=1)


def fitted_variance(error: float) -> float:
    """The variance that maximises the likelihood of images whose mean squared error in [-1, 1], decoded from posterior
    samples and clamped, is this before they are dequantised: uniform noise adds its own variance."""
    return error + BIN**2 / 12


def log_weight(
    x: torch.Tensor, decoded: torch.Tensor, moments: Moments, noise: torch.Tensor, variance: float
) -> torch.Tensor:
    """log p(x|z) + log p(z) - log q(z|x) in nats, fp64 [B], for one draw z = moments.sample(noise) of each image.

    x and what z is decoded to, [B, C, H, W]; moments and standard normal noise [B, c, h, w]. The bounds hold whatever q
    has seen: it may have been the image before it was dequantised.
    """
    error = (x.to(decoded.device) - decoded.double()).square().flatten(1).sum(dim=1)
    likelihood = -0.5 * (error / variance + x[0].numel() * math.log(2 * math.pi * variance))
    return likelihood + log_ratio(moments, noise)


def log_ratio(moments: Moments, noise: torch.Tensor) -> torch.Tensor:
    """log p(z) - log q(z|x) in nats, fp64 [B], at z = moments.sample(noise)."""
    # the constants of p(z) and q(z|x) are the same; (z - mu) / sigma is the noise
    z = moments.sample(noise).double()
    return 0.5 * (noise.double().square() + moments.logvar.double() - z.square()).flatten(1).sum(dim=1)


def importance_bounds(log_weights: torch.Tensor, samples: Sequence[int] = SAMPLES) -> dict[int, torch.Tensor]:
    """log w [B, N] => for each K the bound [B], averaged over the N / K groups of K draws that there are.

    All from the same draws, so the bounds rise with K in every image, not only on average.
    """
    images, total = log_weights.shape
    found = {}
    for count in samples:
        groups = log_weights.reshape(images, total // count, count)
        found[count] = (groups.logsumexp(dim=2) - math.log(count)).mean(dim=1)
    return found


def effective_samples(log_weights: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / sum w^2 [B] of log w [B, N], between 1 and N: how many draws carry the estimate. Near 1 the bound for
    large K says little more than the ELBO: the best draw decides."""
    weights = log_weights.softmax(dim=1)
    effective: torch.Tensor = 1 / weights.square().sum(dim=1)
    return effective


def bits_per_dimension(nats: torch.Tensor, values: int) -> torch.Tensor:
    """log p(x) in nats [B], densities in [-1, 1], of images of so many values (C H W) => bits per 8-bit value [B]."""
    return -nats / (values * math.log(2)) - math.log2(BIN)


class LikelihoodBounds:
    """`update` with every image once (under no_grad), `over_ranks`, then `metrics` and `figures`.

    Each bound is estimated `repeats` times with other draws: their mean over images is the result, and how much the
    repeats' means deviate says how far the draws are to be trusted.
    """

    def __init__(self, variance: float, repeats: int, seed: int) -> None:
        self.variance, self.repeats, self.seed = variance, repeats, seed
        self.bits = {count: Running() for count in SAMPLES}
        self.by_repeat = [{count: Running() for count in SAMPLES} for _ in range(repeats)]
        self.effective = Running()

    def update(self, vae: Any, pixels: torch.Tensor, moments: Moments, indices: Sequence[int]) -> None:
        """Images uint8 [B, C, H, W] with their posteriors [B, c, h, w]; indices name them, for the draws."""
        x = dequantise(pixels, indices, self.seed)
        total = {count: torch.zeros(len(x), dtype=torch.float64) for count in SAMPLES}
        for repeat, runnings in enumerate(self.by_repeat):
            log_weights = self._log_weights(vae, x, moments, indices, repeat)
            self.effective.update(effective_samples(log_weights))
            for count, nats in importance_bounds(log_weights).items():
                bits = bits_per_dimension(nats, x[0].numel())
                runnings[count].update(bits)
                # the mean over repeats is one number for each image, over which the interval is taken
                total[count] += bits / self.repeats
        for count, bits in total.items():
            self.bits[count].update(bits)

    def _log_weights(
        self, vae: Any, x: torch.Tensor, moments: Moments, indices: Sequence[int], repeat: int
    ) -> torch.Tensor:
        found = []
        for draw in range(max(SAMPLES)):
            # one draw at a time: memory stays that of one decode
            keys = [(index, repeat, draw) for index in indices]
            noise = rng.normal(self.seed, "importance", keys, moments.mean.shape[1:]).to(moments.mean)
            decoded = finite.decode(vae, moments.sample(noise)).clamp(-1, 1)
            found.append(log_weight(x, decoded, moments, noise, self.variance).cpu())
        return torch.stack(found, dim=1)

    def over_ranks(self) -> LikelihoodBounds:
        """The same over all ranks."""
        merged = LikelihoodBounds(self.variance, self.repeats, self.seed)
        merged.bits = {count: running.over_ranks() for count, running in self.bits.items()}
        merged.by_repeat = [
            {count: running.over_ranks() for count, running in runnings.items()} for runnings in self.by_repeat
        ]
        merged.effective = self.effective.over_ranks()
        return merged

    def metrics(self) -> dict[str, Summary]:
        """Bits per dimension with intervals over images."""
        return {
            "elbo_bits" if count == 1 else f"iwae_{count}_bits": running.summary()
            for count, running in self.bits.items()
        }

    def figures(self) -> dict[str, Any]:
        """Details of the bounds as plain JSON; spread_bits is the deviation of the repeats' means, by K."""
        return {
            "variance": self.variance,
            "images": int(self.effective.count) // self.repeats,
            "repeats": self.repeats,
            "spread_bits": {
                str(count): statistics.stdev(runnings[count].mean for runnings in self.by_repeat) for count in SAMPLES
            },
            "effective_samples": self.effective.mean,
        }
