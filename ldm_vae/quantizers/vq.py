"""Vector quantisation: the nearest code, its gradient straight through (van den Oord et al., NeurIPS 2017).

The codebook follows the encoder by moving averages or learns by a loss (losses/codebook.py); codes that nothing used
are restarted (`CodebookStatistics`).

Legend: B batch, c channels of a code, p latent positions, N = B p vectors, K codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.autoencoder.codebooks import nearest, positions_of, rows_of
from ldm_vae.core.config import Part
from ldm_vae.quantizers import CodebookStatistics


class VectorQuantizer(Bottleneck):
    """Nearest row of `vae.quantize.embedding`, straight through. With cosine distance rows are kept at unit length, so
    that the nearest row of an unnormalised vector, which VQModel takes, is the one of the largest cosine."""

    gives = "codes"

    def __init__(self, vae: Any, config: Config) -> None:
        super().__init__()
        self.config = config
        book, on_sphere = vae.quantize.embedding.weight, config.distance == "cosine"
        if on_sphere:
            book.data.copy_(F.normalize(book.data, dim=1))
        if config.codebook == "ema":
            book.requires_grad_(False)
        # rows that an average moves or a projection rescales are copied into the averaged weights (ema.py), not
        # averaged again
        if config.codebook == "ema" or on_sphere:
            self.copied = ("quantize.embedding.weight",)
        self.statistics = CodebookStatistics(book, config.decay, config.restart_images, on_sphere)

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments = latents.encode(vae, images)
        book = vae.quantize.embedding.weight
        before = F.normalize(moments.mean, dim=1) if self.config.distance == "cosine" else moments.mean
        rows = rows_of(before.detach())
        indices = nearest(rows, book.detach())
        after = positions_of(F.embedding(indices, book), before)
        # training only: validation must not move the codebook
        if torch.is_grad_enabled():
            self.statistics.see(rows, indices, images_seen)
        codes = Codes(indices.view(len(images), *before.shape[2:]), before, after)
        return Encoded(moments, before + (after - before).detach(), codes)

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        return latents.pixels_of(vae, z, force_not_quantize=True)

    @torch.no_grad()
    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        book = vae.quantize.embedding.weight
        # the optimiser's step has left the sphere
        if self.config.distance == "cosine" and self.config.codebook == "learned":
            book.data.copy_(F.normalize(book.data, dim=1))
        return self.statistics.move(book, follows=not book.requires_grad)

    def leave_out(self) -> None:
        self.statistics.leave_out()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("counts", "sums", "uses", "_extra_state"):  # a checkpoint from before they were a module's
            if prefix + name in state_dict:
                state_dict[f"{prefix}statistics.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Config(Part):
    """Nearest code, straight through."""

    kind: Literal["vq"] = "vq"
    codebook: Literal["ema", "learned"] = "ema"
    """ema: rows are moving averages of their vectors; learned: by gradient, with the term losses.codebook."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """cosine: vectors and rows on the unit sphere (Yu et al., ICLR 2022), which keeps more codes in use."""
    decay: float = Field(0.99, gt=0, lt=1)
    """Of the moving averages, per update."""
    restart_images: int | None = Field(20_000, gt=0)
    """Codes unused in so many images are restarted; null: never."""

    def build(self, vae: Any) -> VectorQuantizer:
        return VectorQuantizer(vae, self)
