"""Finite scalar quantisation (Mentzer, Minnen, Agustsson & Tschannen, ICLR 2024): every channel is rounded to one of a
few levels, so the codebook is a fixed grid that needs no losses, averages or restarts.

The paper bounds a channel with tanh before it rounds; VQModel has no place for that. Here a channel is rounded to the
nearest level and clamped to the outermost, which is what the nearest row of the grid is, so the exported VQModel, whose
codebook holds the grid, gives the same indices. `losses.commitment` keeps vectors within the grid in tanh's stead.

Legend: B batch, c channels of a code, p latent positions, K codes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.core.micro_batches import Pending
from ldm_vae.quantizers import usage


class FiniteScalar(Bottleneck):
    """Each channel at the nearest of its levels, evenly spread from -1 to 1; the gradient goes straight through."""

    gives = "codes"
    copied = ("quantize.embedding.weight",)
    most: torch.Tensor
    strides: torch.Tensor

    def __init__(self, vae: Any, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.pending = Pending()
        book = vae.quantize.embedding.weight
        if book.shape != (math.prod(levels), len(levels)):
            product = " x ".join(map(str, levels))
            raise UsageError(
                f"model.quantizer.levels: {product} are {math.prod(levels)} codes of {len(levels)} channels; expected "
                f"model.num_vq_embeddings {len(book)} and model.latent_channels {book.shape[1]}"
            )
        axes = [torch.linspace(-1, 1, count, dtype=book.dtype, device=book.device) for count in levels]
        book.data.copy_(torch.cartesian_prod(*axes).view_as(book))
        book.requires_grad_(False)
        strides = [math.prod(levels[place + 1 :]) for place in range(len(levels))]
        self.register_buffer("most", torch.tensor(levels) - 1, persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments = latents.encode(vae, images)
        before, book = moments.mean, vae.quantize.embedding.weight
        places = ((before.detach().movedim(1, -1) + 1) / 2 * self.most).round().clamp_min(0).minimum(self.most)
        indices = (places.long() * self.strides).sum(dim=-1)
        after = F.embedding(indices, book).movedim(-1, 1)
        if self.training:  # with a frozen encoder too
            self.pending.add(torch.bincount(indices.flatten(), minlength=len(book)).to(book.dtype))
        return Encoded(moments, before + (after - before).detach(), Codes(indices, before, after))

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        return latents.pixels_of(vae, z, force_not_quantize=True)

    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        return usage(self.pending.total())

    def leave_out(self) -> None:
        self.pending.clear()


class Config(Part):
    """Channels rounded to levels: a fixed grid of codes."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...]
    """Of each channel; their product is model.num_vq_embeddings, their number model.latent_channels. The
    paper's: 8 5 5 5 for 1,000 codes, 8 8 8 5 5 5 for 64,000."""

    def build(self, vae: Any) -> FiniteScalar:
        return FiniteScalar(vae, self.levels)
