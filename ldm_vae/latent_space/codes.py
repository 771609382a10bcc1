"""Use of the codes of a network with codebooks: how often each is the code of a position, over a whole set.

Of equally frequent codes the perplexity is their number; a code without a use is dead (in the images that were seen).

Legend: B batch, q codebooks, p positions, c latent channels, K codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder import latents, signals
from ldm_vae.latent_store.format.codes import CodeStatistics
from ldm_vae.metrics.ranks import total


def code_use(vae: Any, shape: tuple[int, ...]) -> CodeUse:
    """An empty count of the codes of vectors [c, *p]; without a book of a network without codebooks."""
    codes = getattr(vae.config, "num_vq_embeddings", None)
    if codes is None:
        return CodeUse(0, 0)
    found = _by_book(vae, torch.zeros(1, *shape, device=vae.device))
    return CodeUse(len(found), int(codes))


def _by_book(vae: Any, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors before the codebook [B, c, *p], of clips frame by frame => of each codebook the indices [B, *p]."""
    frames = signals.frames_of(vectors) if vectors.ndim == 5 else vectors
    indices = latents.nearest_codes(vae, frames)
    return indices.unbind(1) if indices.ndim == frames.ndim else (indices,)


class CodeUse:
    """`update` with every image once, `over_ranks`, then `figures`. `books`: the counts of each codebook."""

    def __init__(self, books: int, codes: int) -> None:
        self.codes = codes
        self.books = [CodeStatistics(codes) for _ in range(books)]

    def update(self, vae: Any, vectors: torch.Tensor) -> None:
        """Add the codes of vectors before the codebook [B, c, *p]."""
        if self.books and len(vectors):
            for book, indices in zip(self.books, _by_book(vae, vectors), strict=True):
                book.update(indices.cpu().numpy())

    def over_ranks(self) -> CodeUse:
        """The same over all ranks."""
        merged = CodeUse(len(self.books), self.codes)
        for book, own in zip(merged.books, self.books, strict=True):
            book.add(total(torch.from_numpy(own.sums)).numpy())
        return merged

    def figures(self) -> list[dict[str, Any]]:
        """Of each codebook what an index store records of its codes, the number of dead ones, and the uses of each,
        the largest first, without those of dead ones."""
        found = []
        for book in self.books:
            uses = np.sort(book.sums[0, 1:])[::-1].astype(np.int64)
            said = book.to_json()
            del said["images"]  # of clips it would be frames
            found.append({**said, "dead": said["codes"] - said["used"], "uses": uses[uses > 0].tolist()})
        return found
