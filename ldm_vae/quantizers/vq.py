"""Vector quantisation: the nearest code, its gradient straight through (van den Oord et al., NeurIPS 2017).

The codebook follows the encoder by moving averages (Razavi et al. 2019, appendix A.1) or learns by a loss
(losses/codebook.py). Codes that nothing used are restarted at vectors of the current update (Dhariwal et al. 2020). All
statistics are those of the global batch and move once per update, so that 1 x 8 and 8 x 1, processes or micro-batches,
train the same codebook.

Legend: B batch, c channels of a code, h w latent positions, N = B h w vectors, K codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.core import distributed, rng
from ldm_vae.core.config import Part
from ldm_vae.core.micro_batches import Pending
from ldm_vae.quantizers import usage

RECENT = 100  # updates: a code counts as used if one of about so many has used it


class VectorQuantizer(Bottleneck):
    """Nearest row of `vae.quantize.embedding`, straight through. With cosine distance rows are kept at unit length, so
    that the nearest row of an unnormalised vector, which VQModel takes, is the one of the largest cosine."""

    gives = "codes"
    counts: torch.Tensor
    sums: torch.Tensor
    uses: torch.Tensor

    def __init__(self, vae: Any, config: Config) -> None:
        super().__init__()
        self.config = config
        book = vae.quantize.embedding.weight
        if config.distance == "cosine":
            book.data.copy_(F.normalize(book.data, dim=1))
        if config.codebook == "ema":
            book.requires_grad_(False)
        # rows that an average moves or a projection rescales are copied into the averaged weights (ema.py), not
        # averaged again
        if config.codebook == "ema" or config.distance == "cosine":
            self.copied = ("quantize.embedding.weight",)
        self.register_buffer("counts", torch.ones(len(book), dtype=book.dtype))
        self.register_buffer("sums", book.detach().clone())
        self.register_buffer("uses", torch.zeros(len(book), dtype=book.dtype))
        self.period = 0  # of restart_images; a plain number, so that no step waits for the device
        # of the update under way: sums and counts by code, the vectors where a restart is due
        self.pending = Pending()
        self.vectors: list[torch.Tensor] = []
        self.images_seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"period": self.period}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.period = state["period"]

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments = Moments.point(vae.encode(images).latents)
        book = vae.quantize.embedding.weight
        before = F.normalize(moments.mean, dim=1) if self.config.distance == "cosine" else moments.mean
        rows = before.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [N, c]
        indices = nearest(rows, book.detach())
        after = F.embedding(indices, book).view(*before.shape[:1], *before.shape[2:], -1).permute(0, 3, 1, 2)
        # training only: validation must not move the codebook
        if torch.is_grad_enabled():
            self._remember(len(book), rows, indices, images_seen)
        codes = Codes(indices.view(len(images), *before.shape[2:]), before, after)
        return Encoded(moments, before + (after - before).detach(), codes)

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        return latents.pixels_of(vae, z, force_not_quantize=True)

    @torch.no_grad()
    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        """Statistics of the update's global batch, the moving average of the codebook, and restarts."""
        book, decay = vae.quantize.embedding.weight, self.config.decay
        # the optimiser's step has left the sphere
        if self.config.distance == "cosine" and self.config.codebook == "learned":
            book.data.copy_(F.normalize(book.data, dim=1))
        if self.pending.sum is None:  # the encoder is frozen, and the codebook with it
            return {}
        found = self.pending.total()
        counts = found[:, -1]
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(found[:, :-1], alpha=1 - decay)
        self.uses.add_(counts)
        if not book.requires_grad:
            # sums and counts of a row that was not used shrink alike: it stays where it is
            average = self.sums / self.counts.clamp_min(1e-30)[:, None]
            if self.config.distance == "cosine":
                average = F.normalize(average, dim=1)
            book.copy_(torch.where((counts > 0)[:, None], average, book))
        if self._restart_is_due(self.images_seen):
            self._restart(book)
        self.vectors = []
        return usage(self.counts, (1 - decay) * decay**RECENT)

    def leave_out(self) -> None:
        self.pending.clear()
        self.vectors = []

    @torch.no_grad()
    def _remember(self, codes: int, rows: torch.Tensor, indices: torch.Tensor, images_seen: int) -> None:
        """Keep one micro-batch's counts and sums of each code, and its vectors if some will be wanted."""
        found = torch.zeros(codes, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
        self.pending.add(found.index_add_(0, indices, torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)))
        self.images_seen = images_seen
        if self._restart_is_due(images_seen):
            self.vectors.append(rows)

    def _restart_is_due(self, images_seen: int) -> bool:
        every = self.config.restart_images
        return every is not None and images_seen // every != self.period

    def _restart(self, book: torch.Tensor) -> None:
        """Restart dead codes at the end of every `restart_images`: those that were not used in them go to vectors of
        the global batch."""
        assert self.config.restart_images is not None
        self.period = self.images_seen // self.config.restart_images
        dead = (self.uses == 0)[:, None]
        # gathered in the same order everywhere and drawn by key: every rank restarts codes at the same vectors
        vectors = torch.cat([distributed.everybody(rows) for rows in self.vectors])  # in the order of the images
        draw = rng.generator(0, "restart", self.images_seen).integers(0, len(vectors), len(book))
        fresh = vectors[torch.from_numpy(draw).to(vectors.device)]
        book.data.copy_(torch.where(dead, fresh, book))
        self.sums.copy_(torch.where(dead, fresh, self.sums))
        # a count of 1 with the vector as its sum: the average is that vector, and moves with the next use
        self.counts.copy_(torch.where(dead[:, 0], 1.0, self.counts))
        self.uses.zero_()


def nearest(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of book [K, c] for each of rows [N, c]: by the very function of diffusers' VQModel, so that
    ties fall alike."""
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return torch.cdist(rows, book.to(rows.dtype)).argmin(dim=1)


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
