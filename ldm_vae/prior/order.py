"""Orders in which the indices of an image are predicted, as a table: the index that each place of each step holds.

    raster   one index a step, position by position; of several codebooks the first, coarsest, one first
    delay    one step a position, and q - 1 more: codebook k is k steps late, so that a step predicts q indices at once
             from all earlier ones (Copet et al., "Simple and controllable music generation", NeurIPS 2023)

    q = 2, n = 3       raster: 00 10 01 11 02 12        delay: 00 01 02 --
    (book, position)                                           -- 10 11 12

Both are products of conditionals over all indices, hence likelihoods; in delay order the indices of one step are
independent of each other, given the steps before. With one codebook the two are the same.

Legend: B batch, q codebooks, n positions, K codes, S steps, w indices a step.
"""

from __future__ import annotations

from typing import Literal

import torch

OrderName = Literal["raster", "delay"]


def table(order: OrderName, books: int, positions: int) -> torch.Tensor:
    """Places [S, w] into flat indices [q n]; -1 where a step holds none."""
    flat = torch.arange(books * positions).view(books, positions)
    if order == "raster":
        return flat.T.reshape(-1, 1)
    places = torch.full((positions + books - 1, books), -1)
    for book in range(books):
        places[book : book + positions, book] = flat[book]
    return places


def to_steps(indices: torch.Tensor, places: torch.Tensor, blank: int) -> torch.Tensor:
    """indices [B, q n] => [B, S, w], with `blank` where a step holds none."""
    # place -1 is the last column
    return torch.cat([indices, indices.new_full((len(indices), 1), blank)], dim=1)[:, places]


def from_steps(steps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, S, w] => indices [B, q n]."""
    real = places >= 0
    indices = steps.new_empty(len(steps), int(real.sum()))
    indices[:, places[real]] = steps[:, real]
    return indices
