"""Use of the codes of a network with codebooks: how often each is the code of a position, over a whole set.

Of equally frequent codes the perplexity is their number; a code without a use is dead (in the images that were seen).

Legend: B batch, q codebooks, p positions, c latent channels, K codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import codes_of
from ldm_vae.latent_store.format.codes import CodeStatistics
from ldm_vae.metrics.ranks import total


def code_use(vae: Any) -> CodeUse:
    """An empty count of the codes of a network; of no codebook where it has none."""
    books, codes = codes_of(vae) or (0, 0)
    return CodeUse(1 if books is None else books, codes)


class CodeUse:
    """`update` with every image once, `over_ranks`, then `figures`. `books`: the counts of each codebook."""

    def __init__(self, books: int, codes: int) -> None:
        self.codes = codes
        self.books = [CodeStatistics(codes) for _ in range(books)]

    def update(self, vae: Any, vectors: torch.Tensor) -> None:
        """Add the codes of vectors before the codebook [B, c, *p]."""
        if self.books and len(vectors):
            indices = latents.nearest_codes(vae, vectors)
            # a VQModel's have no axis of codebooks
            of_each = indices.unbind(1) if indices.ndim == vectors.ndim else (indices,)
            for book, own in zip(self.books, of_each, strict=True):
                book.update(own.cpu().numpy())

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
            found.append({**said, "dead": said["codes"] - said["used"], "uses": uses[uses > 0].tolist()})
        return found
