"""Sample of images' features, for distances that need all of them at once: those whose keyed number is smallest.

They are the same images in any order and for any number of processes, and memory does not grow with N.

Legend: B batch, D features, n images kept.
"""

from __future__ import annotations

import torch

from ldm_vae.core import rng
from ldm_vae.metrics.frechet import PairFeatures
from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import gather_rows


class Kept:
    """The features of both images of the pairs that are kept, fp32 on the CPU."""

    def __init__(self, purpose: str, features: PairFeatures, dimensions: int, most: int) -> None:
        """purpose: the key of the numbers, so that two metrics may keep different images."""
        self.purpose, self.features, self.dimensions, self.most = purpose, features, dimensions, most
        self.seen = 0
        self._rows = torch.empty(0, 1 + 2 * dimensions)  # number, original, reconstruction
        self._new: list[torch.Tensor] = []

    def update(self, pair: Pair) -> None:
        original, reconstruction = self.features(pair.on_white)
        keys = [(index, frame) for index in pair.indices for frame in range(pair.frames)]
        numbers = [float(rng.generator(0, self.purpose, *key).random()) for key in keys]
        self._new.append(
            torch.cat([torch.tensor(numbers)[:, None], original.float().cpu(), reconstruction.float().cpu()], dim=1)
        )
        self.seen += pair.count
        if sum(map(len, self._new)) > self.most:  # one copy of all that is kept per `most` images, not per batch
            self._settle()

    def _settle(self) -> torch.Tensor:
        self._rows, self._new = _smallest(torch.cat([self._rows, *self._new]), self.most), []
        return self._rows

    def over_ranks(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(originals [n, D], reconstructions [n, D], images seen) over all ranks, the same on every rank."""
        # the smallest of all ranks are among the smallest of each
        rows = _smallest(gather_rows(self._settle()), self.most)
        seen = int(gather_rows(torch.tensor([self.seen])).sum())
        return rows[:, 1 : 1 + self.dimensions], rows[:, 1 + self.dimensions :], seen


def _smallest(rows: torch.Tensor, most: int) -> torch.Tensor:
    return rows[rows[:, 0].argsort(stable=True)[:most]]
