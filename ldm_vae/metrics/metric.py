"""Interface of a metric: `update` with each batch, `compute` once, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch

from ldm_vae.metrics.protocol import Pair
from ldm_vae.metrics.ranks import gather
from ldm_vae.metrics.running import Running, Summary

Better = Literal["higher", "lower"]


class Metric(Protocol):
    """`update` gives the values [B] of a per-image metric, None from a metric of whole sets."""

    name: str
    better: Better

    def update(self, pair: Pair) -> torch.Tensor | None: ...

    def compute(self) -> Summary: ...


class ImageMetric:
    """One number per image, averaged over images; `measure` maps a Pair to values [B]. A clip's number is the mean over
    its frames, and there is one for each place in a clip, averaged over clips."""

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
        self.by_frame: list[Running] = []

    def applies(self, pair: Pair) -> bool:
        """True where its images have such a number."""
        return True

    def of_frames(self, pair: Pair) -> torch.Tensor:
        """Values [B, T] of a pair, T 1 of images: of those with alpha, means over its views."""
        return pair.mean(self.measure).reshape(-1, pair.frames)

    def values(self, pair: Pair) -> torch.Tensor:
        """Values [B] of a pair."""
        return self.of_frames(pair).mean(dim=1)

    def update(self, pair: Pair) -> torch.Tensor | None:
        if not self.applies(pair):
            return None
        found = self.of_frames(pair)[: len(pair.indices)].detach().double().cpu()
        values = found.mean(dim=1)
        self.running.update(values)
        if (places := found.shape[1]) > 1:
            self.by_frame += [Running() for _ in range(places - len(self.by_frame))]
            for running, column in zip(self.by_frame, found.unbind(1), strict=False):
                running.update(column)
        return values

    def compute(self) -> Summary:
        return self.running.over_ranks().summary()

    def compute_frames(self) -> list[Summary]:
        """Summaries over the clips of all ranks of their first frames, their second, and so on; empty of images."""
        places = int(gather(torch.tensor(len(self.by_frame))).max())  # a rank may have had images alone
        own = self.by_frame + [Running() for _ in range(places - len(self.by_frame))]
        return [running.over_ranks().summary() for running in own]


class AlphaMetric(ImageMetric):
    """One number per image of the alpha channel itself."""

    def of_frames(self, pair: Pair) -> torch.Tensor:
        return self.measure(pair).reshape(-1, pair.frames)


class ClipMetric(ImageMetric):
    """One number per clip, averaged over clips; `measure` maps a Pair of more frames than one to values [B]. Images
    have none."""

    def applies(self, pair: Pair) -> bool:
        return pair.frames > 1

    def of_frames(self, pair: Pair) -> torch.Tensor:
        return pair.mean(self.measure)[:, None]


class Unmeasured:
    """A metric whose network is not there: its row says why instead of being left out."""

    def __init__(self, name: str, better: Better, note: str) -> None:
        self.name, self.better, self.note = name, better, note

    def update(self, pair: Pair) -> None:
        return None

    def compute(self) -> Summary:
        return Summary(None, None, 0, note=self.note)
