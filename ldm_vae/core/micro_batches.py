"""Statistics that move once per update: those of its micro-batches are summed first, so that A micro-batches of B
images leave what one batch of A * B leaves.

Nothing here is half done in a checkpoint: those are written between updates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm_vae.core import distributed


class Pending:
    """Sum of a statistic [...] over the micro-batches of the update under way, on this rank and without a graph."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        """Add one micro-batch's value; one of another shape (aspect buckets) starts a new sum."""
        value = value.detach()
        if self.sum is None or self.sum.shape != value.shape:
            self.sum, self.count = value, 1
        else:
            self.sum, self.count = self.sum + value, self.count + 1

    def total(self) -> torch.Tensor:
        """The sum over micro-batches and ranks; begins anew."""
        assert self.sum is not None, "an update without a micro-batch"
        summed = distributed.total(self.sum)
        self.clear()
        return summed

    def mean(self) -> torch.Tensor:
        """The mean over micro-batches and ranks; begins anew."""
        count = self.count
        return self.total() / (count * distributed.world_size())

    def clear(self) -> None:
        """Forget the update under way."""
        self.sum, self.count = None, 0


class LastUpdate(nn.Module):
    """Mean of a statistic over the last whole update, for a term that decides by its batch: the micro-batches of an
    update cannot know their common mean before the last of them, the update before is as good a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.pending = Pending()
        self.last: torch.Tensor | None = None

    def see(self, value: torch.Tensor) -> torch.Tensor:
        """Take a micro-batch's statistic and return the one to decide by: the last update's; before there is one, this
        micro-batch's over all ranks."""
        if torch.is_grad_enabled():
            self.pending.add(value)
        if self.last is None or self.last.shape != value.shape:
            return distributed.mean(value)
        return self.last.to(value)

    def after_update(self) -> None:
        self.last = self.pending.mean()

    def leave_out(self) -> None:
        self.pending.clear()

    def get_extra_state(self) -> dict[str, torch.Tensor | None]:
        return {"last": self.last}

    def set_extra_state(self, state: dict[str, torch.Tensor | None]) -> None:
        self.last = state["last"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", {"last": None})  # a checkpoint from before there was this state
        super()._load_from_state_dict(state_dict, prefix, *rest)
