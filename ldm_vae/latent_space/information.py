"""Mutual information of image and latent, and the distance of the aggregate posterior from the prior.

The rate of an autoencoder splits in two (Hoffman & Johnson, "ELBO surgery", 2016):

    E_x KL(q(z|x) || p(z))  =  I(x; z)  +  KL(q(z) || p(z)),        q(z) = E_x q(z|x), the aggregate posterior

With z_i drawn from the posterior of image i, and M images, q(z_i) is estimated from all M posteriors:

    its own among them   I >= E_i [log q(z_i|x_i) - log 1/M sum_j q(z_i|x_j)]            at most log M
    its own left out     I <= E_i [log q(z_i|x_i) - log 1/(M-1) sum_{j != i} q(z_i|x_j)]

(van den Oord et al. 2018; Poole et al., ICML 2019; densities under a batch's posteriors: Chen et al., NeurIPS 2018.)
The rate less any lower bound of KL(q(z) || p(z)) is an upper bound too. Where no posterior reaches another's, the first
is log M whatever M is: all that can then be said is that the images are told apart.

Legend: M images, c latent channels, h w latent positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder.latents import Moments

SATURATED = 0.9  # of log M: from there on the estimate says more of M than of the latent
BLOCK = 256  # latents whose densities under all posteriors are computed at once


@dataclass(frozen=True)
class Information:
    """Estimates for each image in nats, fp64 [M]; their means are the results: the rate; the lower and the upper bound
    of I(x; z)."""

    rate: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @property
    def cap(self) -> float:
        """log M: no lower bound can be above it."""
        return math.log(len(self.rate))

    @property
    def saturated(self) -> bool:
        """True if the lower bound is near its cap, so that more images would raise it."""
        return float(self.lower.mean()) > SATURATED * self.cap

    def figures(self, prior_gap: float = 0.0) -> dict[str, Any]:
        """Plain JSON: I(x; z) and KL(q(z) || p(z)) each between two bounds, nats per image.

        prior_gap: a lower bound of KL(q(z) || p(z)) known otherwise, such as `ChannelStatistics.prior_gap`.
        """
        rate, lower = float(self.rate.mean()), float(self.lower.mean())
        upper = max(lower, min(rate - prior_gap, float(self.upper.mean())))
        return {
            "images": len(self.rate),
            "rate_nats": rate,
            "mutual_information_nats": [lower, upper],
            "prior_gap_nats": [max(0.0, rate - upper), rate - lower],
            "cap_nats": self.cap,
            "saturated": self.saturated,
        }


@torch.no_grad()
def information(moments: Moments, noise: torch.Tensor) -> Information:
    """Estimate from M images' moments [M, c, h, w], M at least 2, and standard normal noise of that shape.

    M^2 densities of c * h * w numbers each, as two matrix products in fp64.
    """
    center = moments.mean.double().mean(dim=0, keepdim=True)  # smaller numbers cancel less
    mu, logvar = (moments.mean.double() - center).flatten(1), moments.logvar.double().flatten(1)
    eps = noise.to(mu).flatten(1)
    z = mu + torch.exp(0.5 * logvar) * eps
    precision = torch.exp(-logvar)
    # sum_d (z - mu)^2 / sigma^2 + logvar, the squares multiplied out; the constant is the same everywhere
    bias = (mu.square() * precision + logvar).sum(dim=1)
    own = -0.5 * (eps.square() + logvar).sum(dim=1)
    count = len(mu)
    lower, upper = torch.empty_like(own), torch.empty_like(own)
    for start in range(0, count, BLOCK):
        rows = slice(start, min(start + BLOCK, count))
        pairs = -0.5 * (z[rows].square() @ precision.T - 2 * z[rows] @ (mu * precision).T + bias)
        diagonal = torch.arange(start, rows.stop, device=mu.device)
        pairs[diagonal - start, diagonal] = -torch.inf
        others = pairs.logsumexp(dim=1)
        # own density as it was drawn, not from the products: there it is a small difference of large numbers
        lower[rows] = own[rows] - torch.logaddexp(others, own[rows]) + math.log(count)
        upper[rows] = own[rows] - others + math.log(count - 1)
    return Information(moments.kl().double().flatten(1).sum(dim=1), lower, upper)
