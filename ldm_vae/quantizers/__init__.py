"""Quantizers: ways to train a codebook, one file each; the file name is the name under `model.quantizer.kind`.

A file holds `Config(Part)` whose `build(vae)` gives a Bottleneck (`autoencoder/bottleneck.py`). Under `model.quantizer`
it is for a diffusers VQModel: the codebook is the VQModel's own `quantize.embedding`, so what is trained is what is
exported; at inference VQModel takes the nearest row. Under `quantizer` it is for a network of any other class, and a
Config that can be has `beside(channels)`, which gives the codebooks that are kept beside it
(`autoencoder/codebooks.py`). Losses are terms of the objective (losses/codebook.py, commitment.py, code_kl.py,
code_entropy.py).

Legend: N vectors, c their channels, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.autoencoder.codebooks import beside, bits_to_index, corner
from ldm_vae.autoencoder.inward_clamp import inwards
from ldm_vae.core import distributed, rng
from ldm_vae.core.errors import UsageError
from ldm_vae.core.micro_batches import Pending

RECENT = 100  # updates: a code counts as used if one of about so many has used it
COUNTED_BITS = 20  # of an index, up to which the uses of each code are counted for the log


def usage(counts: torch.Tensor, threshold: float = 0.0) -> dict[str, torch.Tensor]:
    """Usage of a codebook, from (decayed) counts [K]: perplexity exp(entropy), between 1 and K, and the share of codes
    whose count is above the threshold."""
    shares = counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"codes/perplexity": entropy.exp(), "codes/usage": (counts > threshold).to(counts.dtype).mean()}


class CodebookStatistics(nn.Module):
    """Statistics of one codebook: it follows its vectors by moving averages (Razavi et al. 2019, appendix A.1), and
    codes that nothing used are restarted at vectors of the current update (Dhariwal et al. 2020).

    All are those of the global batch and move once per update, so that 1 x 8 and 8 x 1, processes or micro-batches,
    train the same codebook.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    uses: torch.Tensor

    def __init__(
        self, book: torch.Tensor, decay: float, restart_images: int | None, on_sphere: bool = False,
        key: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """book [K, c]; on_sphere: its rows are kept at unit length; key: of the draws of this codebook among
        several."""
        super().__init__()
        self.decay, self.restart_images, self.on_sphere, self.key = decay, restart_images, on_sphere, key
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

    @torch.no_grad()
    def see(
        self, rows: torch.Tensor, indices: torch.Tensor, images_seen: int, weights: torch.Tensor | None = None
    ) -> None:
        """Keep one micro-batch's counts and sums of each code, and its vectors if some will be wanted.

        rows [N, c] and the codes that they have [N]; weights [N]: 0 for vectors that do not count.
        """
        rows = rows.detach()
        ones = torch.ones_like(rows[:, :1]) if weights is None else weights[:, None].to(rows)
        found = torch.zeros(len(self.counts), rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
        self.pending.add(found.index_add_(0, indices, torch.cat([rows * ones, ones], dim=1)))
        self.images_seen = images_seen
        if self._restart_is_due(images_seen):
            self.vectors.append(rows)

    @torch.no_grad()
    def move(self, book: torch.Tensor, follows: bool) -> dict[str, torch.Tensor]:
        """Statistics of the update's global batch, the moving average of the codebook where it `follows` its vectors,
        and restarts; figures of its use. Nothing where no vector was seen."""
        if self.pending.sum is None:
            return {}
        found = self.pending.total()
        counts, decay = found[:, -1], self.decay
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(found[:, :-1], alpha=1 - decay)
        self.uses.add_(counts)
        if follows:
            # sums and counts of a row that was not used shrink alike: it stays where it is
            average = self.sums / self.counts.clamp_min(1e-30)[:, None]
            if self.on_sphere:
                average = F.normalize(average, dim=1)
            book.copy_(torch.where((counts > 0)[:, None], average, book))
        if self._restart_is_due(self.images_seen):
            self._restart(book)
        self.vectors = []
        return usage(self.counts, (1 - decay) * decay**RECENT)

    def leave_out(self) -> None:
        """Forget the update under way."""
        self.pending.clear()
        self.vectors = []

    def _restart_is_due(self, images_seen: int) -> bool:
        every = self.restart_images
        return every is not None and images_seen // every != self.period

    def _restart(self, book: torch.Tensor) -> None:
        """Restart dead codes at the end of every `restart_images`: those that were not used in them go to vectors of
        the global batch."""
        assert self.restart_images is not None
        self.period = self.images_seen // self.restart_images
        dead = (self.uses == 0)[:, None]
        # gathered in the same order everywhere and drawn by key: every rank restarts codes at the same vectors
        vectors = torch.cat([distributed.everybody(rows) for rows in self.vectors])  # in the order of the images
        # each vector once where there are enough: which of two equal rows is the nearest is a matter of rounding
        draw = rng.generator(0, "restart", self.images_seen, *self.key).choice(
            len(vectors), len(book), replace=len(vectors) < len(book)
        )
        fresh = vectors[torch.from_numpy(draw).to(vectors.device)]
        book.data.copy_(torch.where(dead, fresh, book))
        self.sums.copy_(torch.where(dead, fresh, self.sums))
        # a count of 1 with the vector as its sum: the average is that vector, and moves with the next use
        self.counts.copy_(torch.where(dead[:, 0], 1.0, self.counts))
        self.uses.zero_()


class BinaryQuantizer(Bottleneck):
    """Sign of each channel (`Corners`), straight through: of a VQModel, whose codebook then holds all corners, or
    beside another network. On the sphere, of the vector at unit length."""

    gives = "codes"

    def __init__(self, vae: Any, sphere: bool, temperature: float) -> None:
        super().__init__()
        self.sphere, self.temperature = sphere, temperature
        self.pending = Pending()
        if beside(vae) is None:
            book = vae.quantize.embedding.weight
            if len(book) != 2 ** book.shape[1]:
                raise UsageError(
                    f"model.num_vq_embeddings: expected 2 ** model.latent_channels = {2 ** book.shape[1]} codes, one "
                    f"for each sign of {book.shape[1]} channels, got {len(book)}"
                )
            edge = torch.tensor([-1.0, 1.0], dtype=book.dtype, device=book.device) * corner(book.shape[1], sphere)
            book.data.copy_(torch.cartesian_prod(*[edge] * book.shape[1]).view_as(book))
            book.requires_grad_(False)
            self.copied = ("quantize.embedding.weight",)

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments = latents.encode(vae, images)
        z, channels = moments.mean, moments.mean.shape[1]
        before, edge = F.normalize(z, dim=1) if self.sphere else z, corner(channels, self.sphere)
        after = torch.where(before.detach() > 0, edge, -edge).to(z)
        indices = bits_to_index(before > 0)
        if self.training and channels <= COUNTED_BITS:
            self.pending.add(torch.bincount(indices.flatten(), minlength=2**channels).to(z.dtype))
        # of -|vector - code|^2 / temperature a channel's two values differ by this
        logits = 4 * edge / self.temperature * before
        indices = indices[:, 0] if beside(vae) is None else indices
        return Encoded(moments, before + (after - before).detach(), Codes(indices, before, after, logits=logits))

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        with inwards(vae):
            return latents.pixels_of(vae, z, force_not_quantize=True)

    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        return {} if self.pending.sum is None else usage(self.pending.total())

    def leave_out(self) -> None:
        self.pending.clear()
