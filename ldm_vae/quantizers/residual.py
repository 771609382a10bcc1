"""Residual vector quantisation (RVQ; Zeghidour et al., SoundStream, 2021): each codebook codes what those before it
have left, of images, clips and sounds alike. The first k codes are the code of k codebooks; with `dropout` the network
is trained for every k, so that the rate is chosen at decode.

Options of later codecs: codes in fewer dimensions (`code_dim`) and by angle (`distance: cosine`), both of
descript-audio-codec (Kumar et al., NeurIPS 2023). As audiocraft's, without projections the gradient goes straight
through the sum of the levels, and each level's commitment reaches the encoder; with them it goes through each level's.

Legend: B batch, c channels of z, p positions, N = B p vectors, q codebooks, d channels of a code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.autoencoder.codebooks import (
    NAME,
    Codebooks,
    ResidualCodebooks,
    Shape,
    beside,
    positions_of,
    precise,
    rows_of,
)
from ldm_vae.autoencoder.inward_clamp import inwards
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.quantizers import CodebookStatistics


class ResidualQuantizer(Bottleneck):
    """Training of the ResidualCodebooks beside a network."""

    gives = "codes"

    def __init__(self, books: ResidualCodebooks, config: Config) -> None:
        super().__init__()
        self.config = config
        self.noise_channels = 2 if config.dropout else 0  # whether a sample has fewer levels, and how many
        self.learns = books.rows.requires_grad  # unless `trainable` names the decoder alone
        if config.codebook == "ema":
            books.rows.requires_grad_(False)
            self.copied = (f"{NAME}.rows",)
        self.levels = nn.ModuleList(
            CodebookStatistics(book, config.decay, config.restart_images, key=(level,))
            for level, book in enumerate(books.rows)
        )

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments, books = latents.encode(vae, images), beside(vae)
        assert isinstance(books, ResidualCodebooks)
        z, factorised = moments.mean, self.config.code_dim is not None
        with precise(images):
            # a level that a sample does without neither decodes nor costs nor moves its codebook
            kept = self._kept(noise, z)
            residual = rows = rows_of(z)
            total, found = torch.zeros_like(rows), []
            for level, statistics in enumerate(self.levels):
                counted = (kept > level).to(rows)
                seen, indices = books.look_up(level, residual)
                row = F.embedding(indices, books.rows[level])
                share = books.share(level, seen + (row - seen).detach() if factorised else row.detach())
                total = total + counted[:, None] * share
                residual = residual - share
                if self.training and self.learns:
                    statistics.see(seen, indices, images_seen, counted)  # type: ignore[operator]
                found.append((indices[:, None], counted[:, None] * seen, counted[:, None] * row))
            if not factorised:
                total = rows + (total - rows).detach()
        indices, before, after = (positions_of(torch.cat(parts, dim=1), z) for parts in zip(*found, strict=True))
        return Encoded(moments, positions_of(total, z), Codes(indices, before, after, levels=len(found)))

    def _kept(self, noise: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Levels that each vector is decoded from [N], one number for a sample, drawn by its key: of a share of the
        samples any from 1 on, as likely; else all."""
        count = len(self.levels)
        kept = torch.full((len(z),), count, device=z.device)
        if self.training and self.config.dropout:
            chance, number = torch.special.ndtr(noise[:, :2].flatten(2)[:, :, 0].double()).unbind(1)
            drawn = (number * count).long().clamp(max=count - 1) + 1
            kept = torch.where(chance < self.config.dropout, drawn, kept)
        return kept.repeat_interleave(z[0, 0].numel())

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        with inwards(vae):
            return latents.pixels_of(vae, z, force_not_quantize=True)

    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        books = beside(vae)
        assert isinstance(books, ResidualCodebooks)
        figures: dict[str, torch.Tensor] = {}
        for level, statistics in enumerate(self.levels):
            own = statistics.move(books.rows.data[level], follows=self.config.codebook == "ema")  # type: ignore[operator]
            figures |= {f"{name}/{level + 1}": value for name, value in own.items()}
        return figures

    def leave_out(self) -> None:
        for statistics in self.levels:
            statistics.leave_out()  # type: ignore[operator]


class Config(Part):
    """Codebooks of what those before them have left."""

    kind: Literal["residual"] = "residual"
    codebooks: int = Field(8, gt=0, le=64)
    """q, the most indices of a position."""
    codes: int = Field(1024, gt=1, le=2**20)
    """K, the codes of each codebook."""
    code_dim: int | None = Field(None, gt=0, le=4096)
    """Factorised codes: vectors are projected to so many channels and codes back (descript-audio-codec: 8); null: codes
    have the channels of z."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """cosine: the code of the smallest angle."""
    codebook: Literal["ema", "learned"] = "ema"
    """ema: rows are moving averages of their vectors; learned: by gradient, with the term losses.codebook."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Share of the samples that are trained with fewer codebooks, any number of them as likely
    (descript-audio-codec: 0.5)."""
    decay: float = Field(0.99, gt=0, lt=1)
    """Of the moving averages, per update."""
    restart_images: int | None = Field(20_000, gt=0)
    """Codes unused in so many images are restarted; null: never."""

    def beside(self, channels: int) -> Codebooks:
        """The codebooks of a network whose z has so many channels."""
        names = ("codebooks", "codes", "code_dim", "distance")
        return Shape(kind="residual", channels=channels, **{name: getattr(self, name) for name in names}).build()

    def build(self, vae: Any) -> ResidualQuantizer:
        books = beside(vae)
        if not isinstance(books, ResidualCodebooks):
            raise UsageError(
                "model.quantizer.kind: a VQModel has one codebook, residual several; expected `quantizer: {kind: "
                "residual}` beside model, and another model.kind"
            )
        return ResidualQuantizer(books, self)
