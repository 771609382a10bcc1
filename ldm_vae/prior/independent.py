"""Independent codes: the frequencies of codes alone, what a prior has to be better than.

    position   p(index) is the frequency of the code at this position
    overall    p(index) is the frequency of the code anywhere (its entropy is the perplexity that a store records)

    fitted     that frequency in the measured images themselves: the fewest bits that one table can take

Overall frequencies have one pseudo-count a code, those of a position as many together as there are codes, spread as the
overall ones: every code has a probability, and a position that was seen rarely falls back to all positions.

Legend: B batch, q codebooks, p positions (n of them), K codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ldm_vae.core import rng
from ldm_vae.prior.sampling import draw


class Uses:
    """Uses of each code in the images that are measured, [q, K]."""

    def __init__(self, books: int, codes: int) -> None:
        self.counts = torch.zeros(books, codes, dtype=torch.float64)

    def update(self, indices: torch.Tensor) -> None:
        """Add indices [B, q, *p]."""
        books = [torch.bincount(book.flatten(), minlength=self.counts.shape[1]) for book in indices.cpu().unbind(1)]
        self.counts += torch.stack(books)

    def entropy(self) -> float:
        """In nats per index, a mean over codebooks."""
        shares = self.counts / self.counts.sum(dim=1, keepdim=True)
        return float(-torch.special.xlogy(shares, shares).sum(dim=1).mean())


class Independent:
    """Frequencies of the codes of some images; log-probabilities overall [q, 1, K] and by position [q, n, K]."""

    def __init__(self, indices: Iterable[torch.Tensor], codes: int, shape: Sequence[int]) -> None:
        """indices: batches [B, q, *p]."""
        self.shape = tuple(shape)
        counts = torch.zeros(self.shape[0], torch.Size(self.shape[1:]).numel(), codes, dtype=torch.float64)
        for some in indices:
            rows = some.flatten(2).movedim(0, -1).cpu()  # [q, n, B]
            counts.scatter_add_(2, rows, torch.ones_like(rows, dtype=counts.dtype))
        overall = counts.sum(dim=1, keepdim=True) + 1
        overall /= overall.sum(dim=2, keepdim=True)
        position = counts + codes * overall
        self.overall, self.position = overall.log(), (position / position.sum(dim=2, keepdim=True)).log()

    def nats(self, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """-log p of each image [B] of indices [B, q, *p]; table: `overall` or `position`."""
        rows = indices.flatten(2).movedim(0, -1).cpu()  # [q, n, B]
        return -table.expand_as(self.position).gather(2, rows).sum(dim=(0, 1))

    def sample(self, seed: int, keys: Sequence[int]) -> torch.Tensor:
        """Indices [B, q, *p], each position by its own frequencies."""
        shape = self.position.shape[:2]
        uniform = [torch.from_numpy(rng.generator(seed, "independent codes", key).random(shape)) for key in keys]
        return torch.stack([draw(self.position, own) for own in uniform]).view(-1, *self.shape)
