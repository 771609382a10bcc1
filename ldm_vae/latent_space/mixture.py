"""A Gaussian mixture over whole latents: the simplest second model that a VAE can be sampled with.

A mixture with full covariances in all c * h * w numbers of a spatial latent has far more parameters than there are
images. So latents are first projected onto their largest principal components, the mixture is fitted there, and what
lies outside is drawn as independent noise of the variance measured in each number. That noise is all the fine structure
that such a sample has. (Ghosh et al., ICLR 2020, sample autoencoders from a mixture, of latent vectors.) The components
are not scaled to one variance: clusters are apart where the variance is large, and scaled-up noise would hide them.

Legend: M latents, c latent channels, h w latent positions (of clips t h w), D = c * h * w, k principal components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError

DIMENSIONS = 64  # k at most
PER_COMPONENT = 10  # latents that there must be for each component, and for each principal component half as many


@dataclass(frozen=True)
class LatentMixture:
    """scikit-learn's `pca` and `mixture`, the deviation outside the components [D], and the shape (c, h, w)."""

    pca: Any
    mixture: Any
    outside: np.ndarray[Any, np.dtype[np.float64]]
    shape: tuple[int, ...]
    explained: float

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """New latents [count, c, h, w], fp32."""
        self.mixture.random_state = seed
        scores, _ = self.mixture.sample(count)
        noise = rng.normal(seed, "outside", range(count), (len(self.outside),)).double().numpy()
        drawn = np.random.default_rng(seed).permutation(self.pca.inverse_transform(scores))  # sorted by component
        return torch.from_numpy(drawn + noise * self.outside).float().view(count, *self.shape)

    def figures(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "components": int(self.mixture.n_components),
            "principal_components": int(self.pca.n_components_),
            "explained_variance": self.explained,
        }


def check_installed() -> None:
    """Raises UsageError where scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "components: the Gaussian mixture needs scikit-learn: pip install 'ldm-vae[demo]'; 0 does without it"
        ) from error


def fit_mixture(latents: torch.Tensor, components: int, seed: int) -> LatentMixture:
    """Fit to latents [M, c, h, w] a mixture of `components` Gaussians, fewer where there are few latents.

    Raises:
        WorkError: there are fewer than 10 latents.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    rows = latents.double().cpu().flatten(1).numpy()
    count, size = rows.shape
    if count < PER_COMPONENT:
        raise WorkError(f"mixture: expected at least {PER_COMPONENT} latents, got {count}")
    kept = min(DIMENSIONS, size, 2 * count // PER_COMPONENT)
    pca = PCA(kept, svd_solver="full" if kept == size else "randomized", random_state=seed)
    scores = pca.fit_transform(rows)
    outside = (rows - pca.inverse_transform(scores)).std(axis=0)
    variances = pca.explained_variance_
    floor = max(
        1e-3 * variances[-1], 1e-9 * variances[0], 1e-12
    )  # a component of few latents has directions without any
    mixture = GaussianMixture(min(components, count // PER_COMPONENT), reg_covar=floor, random_state=seed).fit(scores)
    return LatentMixture(pca, mixture, outside, tuple(latents.shape[1:]), float(pca.explained_variance_ratio_.sum()))
