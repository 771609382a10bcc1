"""Interface of a metric: `update` with each batch, `compute` once, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.running import Running, Summary

Better = Literal["higher", "lower"]


class Metric(Protocol):
    """`update` gives the values [B] of a per-image metric, None from a metric of whole sets."""

    name: str
    better: Better

    def update(self, pair: Pair) -> torch.Tensor | None: ...

    def compute(self) -> Summary: ...


class ImageMetric:
    """One number per image, averaged over images; `measure` maps a Pair to values [B]."""

    def __init__(
        self,
        name: str,
        better: Better,
        measure: Callable[[Pair], torch.Tensor],
        where: Callable[[Pair], torch.Tensor] | None = None,
    ) -> None:
        """where: maps a Pair to [B, 1, H, W], in which places the value comes about; for pictures."""
        self.name, self.better, self.measure, self.where = name, better, measure, where
        self.running = Running()

    def values(self, pair: Pair) -> torch.Tensor:
        """Values [B] of a pair: of images with alpha, means over its views."""
        return pair.mean(self.measure)

    def update(self, pair: Pair) -> torch.Tensor:
        values = self.values(pair)[: pair.count].detach().double().cpu()
        self.running.update(values)
        return values

    def compute(self) -> Summary:
        return self.running.over_ranks().summary()


class AlphaMetric(ImageMetric):
    """One number per image of the alpha channel itself."""

    def values(self, pair: Pair) -> torch.Tensor:
        return self.measure(pair)


class Unmeasured:
    """A metric whose network is not there: its row says why instead of being left out."""

    def __init__(self, name: str, better: Better, note: str) -> None:
        self.name, self.better, self.note = name, better, note

    def update(self, pair: Pair) -> None:
        return None

    def compute(self) -> Summary:
        return Summary(None, None, 0, note=self.note)
