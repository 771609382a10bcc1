"""Codebook indices in a store: the choice of what is stored of a VAE, and the usage of each code.

Legend: B batch, p latent positions, q codebooks, K codes of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from ldm_vae.autoencoder.codebooks import codes_of
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.latent_store.format.layout import StorageDtype, StoreKind

Array = npt.NDArray[np.float64]

MOST_UINT16 = 1 << 16


def choose(vae: Any, store: StoreKind | None, dtype: StorageDtype | None) -> dict[str, Any]:
    """Choose what a store holds of a VAE, as fields of its Identity: the kind of tensors, their dtype, and of indices
    the number of codes and of codebooks.

    None selects what most readers need: indices where there are codebooks, the mean of an encoder without a variance,
    the moments of any other; fp16, or the smallest integer that holds every index.

    Raises:
        UsageError: the VAE does not give that, or the dtype cannot hold it.
    """
    kinds: tuple[StoreKind, ...] = ("moments", "mean", "sample")
    found = codes_of(vae)
    if found is not None:
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
        return {"store": store, "dtype": dtype}
    assert found is not None
    books, codes = found
    integer: StorageDtype = "uint16" if codes <= MOST_UINT16 else "int32"
    if dtype not in (None, integer):
        raise UsageError(f"dtype: indices of {codes:,} codes are stored as {integer}, got {dtype}")
    return {"store": store, "dtype": integer, "codes": codes, "codebooks": books}


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
    """Usage counts of q codebooks of K codes; merging is addition. sums [q, 1 + K] fp64: images, then uses of each
    code."""

    def __init__(self, codes: int, codebooks: int | None = None) -> None:
        """codebooks: None where indices have no axis of them."""
        self.codebooks = codebooks
        self.sums: Array = np.zeros((codebooks or 1, 1 + codes))

    def update(self, indices: npt.NDArray[Any]) -> None:
        """Add indices [B, *p], or of several codebooks [B, q, *p]."""
        self.sums[:, 0] += len(indices)
        books = indices[None] if self.codebooks is None else indices.swapaxes(0, 1)
        for sums, own in zip(self.sums, books, strict=True):
            sums[1:] += np.bincount(own.reshape(-1), minlength=len(sums) - 1)

    def add(self, sums: Array) -> None:
        """Add another accumulator's table of sums."""
        self.sums = self.sums + sums

    def to_json(self) -> dict[str, Any]:
        """Images, positions, codes and used ones; the entropy of their use in bits and its perplexity. Of several
        codebooks all together (used ones of all, entropy a mean), and each under `codebooks`."""
        found = {
            "images": int(self.sums[0, 0]),
            "count": int(self.sums[0, 1:].sum()),
            "codes": self.sums.shape[1] - 1,
            **_use(self.sums[:, 1:]),
        }
        return found if self.codebooks is None else found | {"codebooks": [_use(own[None, 1:]) for own in self.sums]}


def _use(uses: Array) -> dict[str, Any]:
    """Used codes of codebooks, the mean entropy of their use in bits and its perplexity, from uses [q, K]."""
    shares = uses / np.maximum(1.0, uses.sum(axis=1, keepdims=True))
    entropy = float(np.mean([-(own[own > 0] * np.log(own[own > 0])).sum() for own in shares]))
    return {
        "used": int((uses > 0).sum()),
        "entropy_bits": entropy / math.log(2),
        "perplexity": math.exp(entropy),
    }


def codes_in_words(usage: Mapping[str, Any]) -> str:
    """Codes of a store, from its `to_json`: `1,024`, of several codebooks `8 x 1,024`."""
    books = len(usage.get("codebooks", ()))
    return f"{books} x {usage['codes']:,}" if books else f"{usage['codes']:,}"
