"""Identity of a store: what must be equal for two samples to live in one."""

from __future__ import annotations

import hashlib
import json

from pydantic import Field, model_validator

from ldm_vae.core.config import Section
from ldm_vae.latent_store.format.layout import VIEWS, ComputeDtype, StorageDtype, StoreKind

LARGEST = 2**31  # rows of a shard, sides, channels: what is beyond it was not made by an encoder


class Identity(Section):
    """Properties that must be equal for two samples to live in one store."""

    encoder: str
    """SHA-256 of the encoder's and quant_conv's tensors."""
    preprocessing: str
    """Version of resize, crop and scaling to [-1, 1]."""
    resolution: tuple[int, ...]
    """Side of the square crops in pixels; several give several shapes."""
    store: StoreKind
    """Which tensors: mean and logvar, mean alone, one sample, or indices of codes."""
    dtype: StorageDtype
    """How a value is stored."""
    mixed_precision: ComputeDtype
    """How the encoder computed; `no` is fp32."""
    shard_size: int = Field(gt=0)
    """Source samples per work unit."""
    views: tuple[str, ...] = ("",)
    """View suffixes; the empty one is the centre crop as it is."""
    bucket_step: int | None = None
    """Aspect buckets with sides in steps of this; None is one square."""
    tile: tuple[int, int] | None = None
    """Tile and overlap in pixels, where larger images are encoded in tiles."""
    pixels: bool = False
    """Whether the crops are stored too, as uint8."""
    codes: int | None = None
    """Codes in a codebook, where indices are stored."""
    codebooks: int | None = None
    """Codebooks q of indices [q, *p] (p: h w, of clips t h w); None: indices [*p] of a VQModel's one."""
    patch: int = Field(1, gt=0, le=64)
    """Side of the squares of positions that the VAE's pipelines make channels of; statistics are of these channels."""

    @model_validator(mode="after")
    def _check(self) -> Identity:
        tile, overlap = self.tile or (1, 0)  # tiles of few latents do not overlap
        numbers = (*self.resolution, tile, overlap + 1, self.bucket_step or 1, self.codes or 1, self.codebooks or 1)
        if not self.resolution or not all(0 < number <= LARGEST for number in numbers):
            raise ValueError("resolution, tile, bucket_step, codes and codebooks: expected numbers above 0")
        if (self.store == "indices") != (self.codes is not None):
            raise ValueError(f"codes: expected their number for indices alone, got {self.codes} for {self.store}")
        if self.codebooks is not None and self.codes is None:
            raise ValueError(f"codebooks: expected their number for indices alone, got it for {self.store}")
        if self.views[:1] != ("",) or len({*self.views, *VIEWS}) > len(VIEWS) or len({*self.views}) < len(self.views):
            raise ValueError(f"views: expected the centre crop first, then some of {', '.join(VIEWS[1:])}")
        return self

    @property
    def axes(self) -> int:
        """Axes of a stored value in front of its positions: one, of channels or of codebooks; none of a VQModel's
        indices."""
        return int(self.codes is None or self.codebooks is not None)

    @property
    def digest(self) -> str:
        """SHA-256 of the fields that are not at their default, so that a new field with a default changes nothing."""
        tree = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
