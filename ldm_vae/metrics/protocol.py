"""The evaluation protocol: what is compared with what, before any metric sees it.

The same network scores up to 1 dB apart under the protocols in use, so ours is pinned, has a version, and stands in
every result file: the mode of the posterior is decoded, output is clamped to [-1, 1] and *rounded* to 8 bits, and every
metric compares those 8-bit images.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Pair:
    """A batch of originals and their reconstructions, each [B, C, H, W] fp32; the first `count` are to be measured and
    the others pad the batch, so that an image's numbers do not depend on how full its batch was.

    original and reconstruction are on the 0..255 scale, quantised as the protocol says; raw_original and
    raw_reconstruction are pixels in [-1, 1], the latter as decoded: not clamped.
    """

    original: torch.Tensor
    reconstruction: torch.Tensor
    raw_original: torch.Tensor
    raw_reconstruction: torch.Tensor
    count: int


@dataclass(frozen=True)
class Protocol:
    """The choices that change a number. PINNED is ours; no other is used unless it is asked for by name."""

    name: str
    version: int
    posterior: Literal["mode", "sample"] = "mode"
    """What is decoded: the mean, or one draw."""
    rounding: Literal["round", "truncate", "truncate_half_up"] = "round"
    """Floats to 8 bits: round(127.5 x + 127.5), its floor, or floor(127.5 x + 128) as in several public scripts."""
    source: str = ""
    """Where the protocol was read."""

    def pair(self, original: torch.Tensor, reconstruction: torch.Tensor, count: int | None = None) -> Pair:
        """original and reconstruction [B, C, H, W], pixels in [-1, 1] => what the metrics compare."""
        original, reconstruction = original.float(), reconstruction.float()
        quantised = self.quantise(original), self.quantise(reconstruction)
        return Pair(*quantised, original, reconstruction, len(original) if count is None else count)

    def quantise(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels in [-1, 1], or beyond => whole numbers 0..255, fp32."""
        if self.rounding == "round":
            return (pixels * 127.5 + 127.5).round().clamp(0, 255)
        offset = 127.5 if self.rounding == "truncate" else 128.0
        return (pixels * 127.5 + offset).clamp(0, 255).floor()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


PINNED = Protocol("ldm-vae", 1, source="this project, docs/evaluation.md")
