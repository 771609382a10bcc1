"""Processes: how the work on a store is shared among the processes of a launch, and among launches that do not
communicate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ldm_vae.core.ownership import WHOLE, Part


@dataclass(frozen=True)
class Processes:
    """This process, all of its launch, how they wait for each other; and the launch's part where several share a job
    without communication."""

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None
    part: Part = WHOLE

    @property
    def launch(self) -> slice:
        """The launch's share of a list that all parts see alike."""
        return slice(self.part.index - 1, None, self.part.count)

    @property
    def own(self) -> slice:
        """This process's share of that list."""
        return slice(self.part.index - 1 + self.part.count * self.rank, None, self.part.count * self.count)
