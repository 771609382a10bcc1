"""Codebook indices in a store: the choice of what is stored of a VAE, and the usage of each code.

Legend: B batch, h w latent positions, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from diffusers import VQModel
from pydantic import ConfigDict, Field

from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.latent_store.format.layout import StorageDtype, StoreKind

Array = npt.NDArray[np.float64]

MOST_UINT16 = 1 << 16


def choose(vae: Any, store: StoreKind | None, dtype: StorageDtype | None) -> tuple[StoreKind, StorageDtype, int | None]:
    """Choose what a store holds of a VAE: the kind of tensors, their dtype, and for indices the number of codes.

    None selects what most readers need: indices of a VQModel, the mean of an encoder without a variance, the moments of
    any other; fp16, or the smallest integer that holds every index.

    Raises:
        UsageError: the VAE does not give that, or the dtype cannot hold it.
    """
    kinds: tuple[StoreKind, ...] = ("moments", "mean", "sample")
    if isinstance(vae, VQModel):
        kinds = ("indices", "mean")
    elif geometry_of(vae).is_point:
        kinds = ("mean",)
    store = kinds[0] if store is None else store
    if store not in kinds:
        raise UsageError(f"store: expected {' or '.join(kinds)} of {an(type(vae).__name__)}, got {store}")
    if store != "indices":
        dtype = "fp16" if dtype is None else dtype
        if dtype not in ("fp16", "bf16", "fp32"):
            raise UsageError(f"dtype: expected fp16, bf16 or fp32 for {store}, got {dtype}")
        return store, dtype, None
    codes = int(vae.config.num_vq_embeddings)
    integer: StorageDtype = "uint16" if codes <= MOST_UINT16 else "int32"
    if dtype not in (None, integer):
        raise UsageError(f"dtype: indices of {codes:,} codes are stored as {integer}, got {dtype}")
    return store, integer, codes


class Usage(Section):
    """Statistics of indices as JSON."""

    model_config = ConfigDict(strict=True, extra="ignore")
    images: int = Field(gt=0)
    count: int = Field(gt=0)
    codes: int = Field(gt=0)
    used: int = Field(gt=0)
    entropy_bits: float
    perplexity: float


class CodeStatistics:
    """Usage counts of K codes; merging is addition. sums [1, 1 + K] fp64: images, then uses of each code."""

    def __init__(self, codes: int) -> None:
        self.sums: Array = np.zeros((1, 1 + codes))

    def update(self, indices: npt.NDArray[Any]) -> None:
        """Add indices [B, h, w]."""
        self.sums[0, 0] += len(indices)
        self.sums[0, 1:] += np.bincount(indices.reshape(-1), minlength=self.sums.shape[1] - 1)

    def add(self, sums: Array) -> None:
        """Add another accumulator's table of sums."""
        self.sums = self.sums + sums

    def to_json(self) -> dict[str, Any]:
        """Images, positions, codes and used ones; the entropy of their use in bits and its perplexity."""
        images, uses = self.sums[0, 0], self.sums[0, 1:]
        shares = uses[uses > 0] / max(1.0, uses.sum())
        entropy = float(-(shares * np.log(shares)).sum())
        return {
            "images": int(images),
            "count": int(uses.sum()),
            "codes": len(uses),
            "used": int((uses > 0).sum()),
            "entropy_bits": entropy / math.log(2),
            "perplexity": math.exp(entropy),
        }
