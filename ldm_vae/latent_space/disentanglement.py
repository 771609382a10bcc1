"""Disentanglement of a latent code by known factors: the mutual information gap (Chen et al., NeurIPS 2018).

    MIG = mean over factors of  (I(z_j; v) - max over k != j of I(z_k; v)) / H(v),    j the dimension with the largest

1 where each factor is in one dimension and that alone, 0 where every factor is in two dimensions alike. Here it is no
estimate from samples: all images and their probabilities are known, q(z_j | v) is a mixture of their Gaussians, and

    I(z_j; v) = sum over values v of p(v) KL(q(z_j | v) || q(z_j))

is integrated over z_j. Without supervision a high MIG is luck or bias: of a model and the same model with its latent
rotated no data can tell which is which (Locatello et al., ICML 2019).

Legend: N images, c latent dimensions, F factors, M points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ldm_vae.autoencoder.latents import Moments

NARROWEST = 1 / 4096  # of a dimension's range: a posterior that is narrower counts as that wide
FAR = 8.0  # deviations of a posterior that are integrated


def mutual_information(moments: Moments, factors: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """I(z_j; v_k) in nats, fp64 [c, F].

    moments: of every image, [N, c]; factors [N, F]: numbers of their values; probabilities [N], which sum to 1.
    """
    # by value of each factor, all factors beside each other: the weights of its images [N, values], its probability
    columns = [F.one_hot(factor).double() * probabilities.double()[:, None] for factor in factors.T]
    mass = torch.cat(columns, dim=1).sum(dim=0)
    weights = torch.cat(columns, dim=1) / mass.clamp(min=1e-300)
    rows = []
    for mean, logvar in zip(moments.mean.double().T, moments.logvar.double().T, strict=True):
        spread = mean.max() - mean.min()
        sigma = torch.exp(0.5 * logvar).clamp(min=max(1e-12, float(spread) * NARROWEST))
        low, high = float((mean - FAR * sigma).min()), float((mean + FAR * sigma).max())
        # at half a deviation the trapezoidal rule leaves 3e-8 nats of one bit through noise, at a quarter 1e-9 or less
        z = torch.linspace(low, high, math.ceil(4 * (high - low) / float(sigma.min())) + 1, dtype=torch.float64)
        given = torch.cat([_densities(some, mean, sigma) @ weights for some in torch.split(z, 1024)])  # [M, values]
        overall = given @ mass / factors.shape[1]  # each factor's values give q(z_j)
        divergence = (torch.special.xlogy(given, given) - torch.special.xlogy(given, overall[:, None])).sum(dim=0)
        shares = torch.split(mass * divergence * (z[1] - z[0]), [column.shape[1] for column in columns])
        rows.append(torch.stack([share.sum() for share in shares]))
    return torch.stack(rows).clamp(min=0)


def _densities(z: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """N(z; mean, sigma) [M, N]."""
    away = (z[:, None] - mean) / sigma
    return torch.exp(-0.5 * away.square()) / (sigma * math.sqrt(2 * math.pi))


def entropies(factors: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """H(v_k) in nats, fp64 [F]."""
    tables = [F.one_hot(factor).double().T @ probabilities.double() for factor in factors.T]
    return torch.stack([-torch.special.xlogy(table, table).sum() for table in tables])


def information_gaps(information: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """The gap of each factor [F], between 0 and 1, from I(z_j; v_k) [c, F] and H(v_k) [F]; their mean is the MIG. Of
    one dimension nothing is subtracted."""
    first = information.sort(dim=0, descending=True).values
    second = first[1] if len(first) > 1 else torch.zeros_like(entropy)
    return (first[0] - second) / entropy


def rotated(moments: Moments, rotation: torch.Tensor) -> Moments:
    """Marginals of the posteriors [N, c] after z => R z, R [c, c] orthogonal: the mean R mu, the variances R^2 sigma^2.
    With the decoder of R^T z it is the same model of images."""
    mean, variance = moments.mean.double() @ rotation.T, moments.logvar.double().exp() @ rotation.square().T
    return Moments(mean, variance.log())
