"""Each latent channel's distribution over images and positions, in one pass and constant memory.

What is described is z = mu + sigma * eps, the latent that is sampled, and the noise is integrated in closed form, so no
draw of it makes a number uncertain. With m = E[mu] and d = mu - m:

    variance         v = E[d^2] + E[sigma^2]                                     (law of total variance)
    excess kurtosis  (E[d^4] + 6 E[d^2 sigma^2] + 3 E[sigma^4]) / v^2 - 3        (0 for a Gaussian)
    covariance       E[d d^T] + diag E[sigma^2]

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm_vae.latent_store.statistics import REPLICATES, LatentStatistics
from ldm_vae.latents import Moments
from ldm_vae.metrics.ranks import gather
from ldm_vae.objective import ACTIVE

ROWS = ("kl", "cube", "fourth", "noisy", "noisy_square", "noise_square")


class ChannelStatistics:
    """`update` with every image once, `over_ranks`, then `figures`. Power sums in fp64: the fourth loses (m / std)^4 of
    its sixteen digits to a channel's offset, none that anybody reads.

    sums [len(ROWS) + c, c]: sums over images and positions of what ROWS name, then of mu mu^T.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.basic = LatentStatistics()  # mean, variance and their intervals: those of a latent store
        self.sums = torch.zeros(len(ROWS) + channels, channels, dtype=torch.float64)
        self.is_point = False

    def update(self, moments: Moments, keys: Sequence[int]) -> None:
        """Add moments [B, c, h, w] of the images that `keys` name (the bootstrap draws by them)."""
        self.basic.update(moments, keys)
        self.is_point = moments.is_point
        mu = moments.mean.double().transpose(0, 1).flatten(1)  # [c, B h w]
        noise = moments.logvar.double().exp().transpose(0, 1).flatten(1)
        rows = {
            "kl": moments.kl().double().transpose(0, 1).flatten(1),
            "cube": mu**3,
            "fourth": mu**4,
            "noisy": mu * noise,
            "noisy_square": mu.square() * noise,
            "noise_square": noise.square(),
        }
        self.sums += torch.cat([torch.stack([rows[name].sum(dim=1) for name in ROWS]), mu @ mu.T]).cpu()

    def over_ranks(self) -> ChannelStatistics:
        """The same over all ranks, added in rank order."""
        merged = ChannelStatistics(self.channels)
        merged.sums = gather(self.sums).sum(dim=0)
        merged.is_point = bool(gather(torch.tensor(self.is_point)).any())
        none = torch.zeros(1 + REPLICATES, 2 + 3 * self.channels, dtype=torch.float64)  # of a rank without images
        own = none if self.basic.sums is None else torch.from_numpy(self.basic.sums)
        merged.basic.add(gather(own).sum(dim=0).numpy())
        return merged

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> torch.Tensor:
        """m [c]."""
        return self.basic.mean

    @property
    def std(self) -> torch.Tensor:
        """Square root of v [c]."""
        return self.basic.variance.sqrt()

    @property
    def signal_variance(self) -> torch.Tensor:
        """E[d^2] [c]: how much the posterior mean varies over images and positions."""
        return self.basic.variance - self.basic.posterior_variance

    @property
    def kl(self) -> torch.Tensor | None:
        """Nats per image [c]; None of an encoder without a variance."""
        return None if self.is_point else self._row("kl") * self.basic.count / self.basic.images

    @property
    def active(self) -> torch.Tensor:
        """Whether a channel's signal variance is above 0.01 [c] (Burda et al., ICLR 2016)."""
        return self.signal_variance > ACTIVE

    @property
    def excess_kurtosis(self) -> torch.Tensor:
        """[c]: 0 for a Gaussian, above where a few large values stand out, -1.2 for a uniform channel."""
        m, noise = self.mean, self.basic.posterior_variance
        square = self.signal_variance + m.square()
        fourth = self._row("fourth") - 4 * m * self._row("cube") + 6 * m.square() * square - 3 * m**4
        both = self._row("noisy_square") - 2 * m * self._row("noisy") + m.square() * noise
        return (fourth + 6 * both + 3 * self._row("noise_square")) / self.basic.variance.square() - 3

    @property
    def correlation(self) -> torch.Tensor:
        """Between channels at one position [c, c]; 1 on the diagonal."""
        products = self.sums[len(ROWS) :] / self.basic.count
        covariance = products - torch.outer(self.mean, self.mean) + self.basic.posterior_variance.diag()
        return covariance / torch.outer(self.std, self.std)

    @property
    def prior_gap(self) -> float:
        """A lower bound of KL(q(z) || N(0, I)) in nats per image, from first and second moments of the channels:

            h w KL(N(m, C) || N(0, I_c)),        C the covariance of channels, pooled over positions

        Of all distributions with these moments a Gaussian is nearest to the prior; dependence between positions and
        differences between them, which are left out, only add to the gap (the prior is a product, KL is convex).
        """
        covariance = self.correlation * torch.outer(self.std, self.std)
        gap = 0.5 * (covariance.trace() + self.mean.square().sum() - self.channels - torch.logdet(covariance))
        return float(gap) * self.basic.count / self.basic.images

    def figures(self) -> dict[str, Any]:
        """All of it as plain JSON; `ci95` holds the bootstrap intervals of mean and std."""
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

    def _row(self, name: str) -> torch.Tensor:
        return self.sums[ROWS.index(name)] / self.basic.count
