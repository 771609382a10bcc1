"""Each latent channel's distribution over images and positions, in one pass and constant memory.

What is described is z = mu + sigma * eps, the latent that is sampled, and the noise is integrated in closed form, so no
draw of it makes a number uncertain. With m = E[mu] and d = mu - m:

    variance         v = E[d^2] + E[sigma^2]                                     (law of total variance)
    excess kurtosis  (E[d^4] + 6 E[d^2 sigma^2] + 3 E[sigma^4]) / v^2 - 3        (0 for a Gaussian)
    covariance       E[d d^T] + diag E[sigma^2]

Powers are summed of mu less a centre near the mean (that of the first batch), and moved to the mean at the end: a power
of a number far from 0 has no digit left for how it varies.

Legend: B batch, c latent channels, h w latent positions, G groups of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.latent_store.format.statistics import REPLICATES, LatentStatistics
from ldm_vae.metrics.ranks import gather
from ldm_vae.training.objective import ACTIVE

ROWS = ("kl", "cube", "fourth", "noisy", "noisy_square", "noise_square")
FIRST = ("positions", "first", "noise")  # of each group, before its products
GROUPS = 32  # of images, for the jackknife: fewer leave more noise in its estimate of the bias


class ChannelStatistics:
    """`update` with every image once, `over_ranks`, then `figures`. Sums in fp64 over images and positions.

    centre [c]: c0, from which d = mu - c0 is counted; None before the first image.
    sums [len(ROWS), c]: of kl, d^3, d^4, d sigma^2, d^2 sigma^2, sigma^4.
    groups [G, len(FIRST) + c, c]: of each group of images the number of positions, the sums of d, of sigma^2, of d d^T.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.basic = LatentStatistics()  # mean, variance and their intervals: those of a latent store
        self.centre: torch.Tensor | None = None
        self.sums = torch.zeros(len(ROWS), channels, dtype=torch.float64)
        self.groups = torch.zeros(GROUPS, len(FIRST) + channels, channels, dtype=torch.float64)
        self.is_point = False

    def update(self, moments: Moments, keys: Sequence[int]) -> None:
        """Add moments [B, c, h, w] of the images that `keys` name (replicates and groups go by them)."""
        if not len(moments.mean):
            return
        self.basic.update(moments, keys)
        self.is_point = moments.is_point
        mu, noise = moments.mean.double().flatten(2), moments.logvar.double().exp().flatten(2)  # [B, c, h w]
        if self.centre is None:
            self.centre = mu.mean(dim=(0, 2)).cpu()
        d = mu - self.centre.to(mu.device).view(-1, 1)
        rows = {
            "kl": moments.kl().double().flatten(2),
            "cube": d**3,
            "fourth": d**4,
            "noisy": d * noise,
            "noisy_square": d.square() * noise,
            "noise_square": noise.square(),
        }
        self.sums += torch.stack([rows[name].sum(dim=(0, 2)) for name in ROWS]).cpu()
        first = torch.stack([torch.full_like(d[..., 0], d.shape[2]), d.sum(dim=2), noise.sum(dim=2)], dim=1)
        images = torch.cat([first, d @ d.transpose(1, 2)], dim=1).cpu()
        self.groups.index_add_(0, torch.tensor([key % GROUPS for key in keys]), images)

    def over_ranks(self) -> ChannelStatistics:
        """The same over all ranks, added in rank order."""
        merged = ChannelStatistics(self.channels)
        unseen = torch.full((self.channels,), torch.nan, dtype=torch.float64)  # the centre of a rank without images
        centres = gather(unseen if self.centre is None else self.centre)
        seen = centres[~centres.isnan().any(dim=1)]
        merged.centre = seen[0] if len(seen) else None
        sums, groups = self._about(merged.centre) if merged.centre is not None else (self.sums, self.groups)
        merged.sums, merged.groups = gather(sums).sum(dim=0), gather(groups).sum(dim=0)
        merged.is_point = bool(gather(torch.tensor(self.is_point)).any())
        none = torch.zeros(1 + REPLICATES, 2 + 3 * self.channels, dtype=torch.float64)  # of a rank without images
        own = none if self.basic.sums is None else torch.from_numpy(self.basic.sums)
        merged.basic.add(gather(own).sum(dim=0).numpy())
        return merged

    def _about(self, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sums and groups of mu less another centre [c], by the binomial theorem."""
        if self.centre is None:
            return self.sums, self.groups
        step = centre - self.centre
        count, first, noise, products = _parts(self.groups)
        moved = products - step[:, None] * first[:, None] - first[..., None] * step + count[:, None] * step.outer(step)
        groups = torch.cat([torch.stack([count, first - count * step, noise], dim=1), moved], dim=1)
        count, first, noise, products = (part.sum(dim=0) for part in (count, first, noise, products))
        square = products.diag()
        kl, cube, fourth, noisy, noisy_square, noise_square = self.sums
        sums = {
            "kl": kl,
            "cube": cube - 3 * step * square + 3 * step**2 * first - count * step**3,
            "fourth": fourth - 4 * step * cube + 6 * step**2 * square - 4 * step**3 * first + count * step**4,
            "noisy": noisy - step * noise,
            "noisy_square": noisy_square - 2 * step * noisy + step**2 * noise,
            "noise_square": noise_square,
        }
        return torch.stack([sums[name] for name in ROWS]), groups

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> torch.Tensor:
        """m [c]."""
        return self.basic.mean

    @property
    def std(self) -> torch.Tensor:
        """Square root of v [c]."""
        return (self.signal_variance + self.basic.posterior_variance).sqrt()

    @property
    def signal_variance(self) -> torch.Tensor:
        """E[d^2] [c]: how much the posterior mean varies over images and positions."""
        return _covariance(self.groups.sum(dim=0)).diag().clamp(min=0)

    @property
    def kl(self) -> torch.Tensor | None:
        """Nats per image [c]; None of an encoder without a variance."""
        return None if self.is_point else self.sums[ROWS.index("kl")] / self.basic.images

    @property
    def active(self) -> torch.Tensor:
        """True for a channel whose signal variance is above 0.01 [c] (Burda et al., ICLR 2016)."""
        return self.signal_variance > ACTIVE

    @property
    def excess_kurtosis(self) -> torch.Tensor:
        """[c]: 0 for a Gaussian, above where a few large values stand out, -1.2 for a uniform channel; 0 of a channel
        that never varies."""
        sums, _ = self._about(self.mean)
        of = {name: row / self.basic.count for name, row in zip(ROWS, sums, strict=True)}
        found = (of["fourth"] + 6 * of["noisy_square"] + 3 * of["noise_square"]) / self.std**4 - 3
        return torch.where(self._varies, found, 0.0)

    @property
    def correlation(self) -> torch.Tensor:
        """Between channels at one position [c, c]; 1 on the diagonal, 0 with a channel that never varies."""
        covariance = _covariance(self.groups.sum(dim=0)) + self.basic.posterior_variance.diag()
        found = torch.where(self._varies.outer(self._varies), covariance / self.std.outer(self.std), 0.0)
        return found.fill_diagonal_(1.0)

    @property
    def _varies(self) -> torch.Tensor:
        """True where a channel's deviation is more than rounding of fp64 [c]."""
        return self.std > 1e-12 * self.mean.abs()

    @property
    def prior_gap(self) -> float:
        """A lower bound of KL(q(z) || N(0, I)) in nats per image, from first and second moments of the channels:

            h w KL(N(m, C) || N(0, I_c)),        C the covariance of channels, pooled over positions

        Of all distributions with these moments a Gaussian is nearest to the prior; dependence between positions and
        differences between them, which are left out, only add to the gap (the prior is a product, KL is convex).

        Of M images the formula is too large by c (c + 3) / (4 M) where positions are independent, by up to h w times
        that where they are not: log det C is too small. A jackknife over groups of images takes that out, whatever the
        dependence within an image (Busing, Meijer & van der Leeden, Statistics and Computing 1999, for groups of
        unequal size); for fewer images than channels it takes out too much. Never below 0; 0 of a single image.
        """
        groups = self.groups[self.groups[:, 0, 0] > 0]
        whole = groups.sum(dim=0)
        if len(groups) < 2:
            return 0.0
        shares = groups[:, 0, 0] / whole[0, 0]
        without = sum((1 - share) * self._gap(whole - group) for share, group in zip(shares, groups, strict=True))
        gap = max(0.0, float(len(groups) * self._gap(whole) - without))
        return gap * self.basic.count / self.basic.images

    def _gap(self, group: torch.Tensor) -> torch.Tensor:
        """KL(N(m, C) || N(0, I_c)) of the sums of some images [len(FIRST) + c, c]."""
        count, first, noise, _ = _parts(group)
        mean = first / count + (0.0 if self.centre is None else self.centre)
        covariance = _covariance(group) + (noise / count).diag()
        gap: torch.Tensor = covariance.trace() + mean.square().sum() - self.channels - torch.logdet(covariance)
        return 0.5 * gap

    def figures(self) -> dict[str, Any]:
        """All of it as plain JSON; `ci95` holds the intervals of mean and std."""
        intervals = self.basic.intervals or {}
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "posterior_std": None if self.is_point else self.basic.posterior_variance.sqrt().tolist(),
            "excess_kurtosis": self.excess_kurtosis.tolist(),
            "kl_nats_per_image": None if self.kl is None else self.kl.tolist(),
            "active": self.active.tolist(),
            "correlation": self.correlation.tolist(),
            "ci95": {name: intervals.get(f"latents_{name}") for name in ("mean", "std")},
        }


def _parts(groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Number of positions, sums of d, of sigma^2 [..., c] and of d d^T [..., c, c]."""
    return (*groups[..., : len(FIRST), :].unbind(dim=-2), groups[..., len(FIRST) :, :])


def _covariance(group: torch.Tensor) -> torch.Tensor:
    """Covariance [c, c] of the posterior means, from sums over some images."""
    count, first, _, products = _parts(group)
    mean = first / count
    return products / count - mean.outer(mean)
