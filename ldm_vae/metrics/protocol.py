"""The evaluation protocol: what is compared with what, before any metric sees it.

The same network scores up to 1 dB apart under the protocols in use, so ours is pinned, has a version, and stands in
every result file: the mode of the posterior is decoded, output is clamped to [-1, 1] and *rounded* to 8 bits, and every
metric compares those 8-bit images.

Clips are compared frame by frame: a pair holds their frames, folded into the batch, and a clip's value is the mean over
its own. Sounds are compared as they are decoded, neither clamped nor rounded, each as far as it goes: not
the silence that fills its excerpt.

Legend: B batch, C channels, T frames, H W pixels, L samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import not_among
from ldm_vae.data.alpha import BACKGROUNDS, composite


@dataclass(frozen=True)
class Pair:
    """A batch of originals and their reconstructions, each [B, C, H, W] fp32, of clips the frames [B*T, C, H, W].

    original and reconstruction are on the 0..255 scale, quantised as the protocol says; raw_original and
    raw_reconstruction are pixels in [-1, 1], the latter as decoded: not clamped. The first len(indices) images are to
    be measured; the others pad the batch, so that an image's numbers do not depend on how full its batch was. alpha:
    the fourth channel is straight alpha; metrics of colour compare `views`. frames: T, 1 of images. Of sounds all four
    are samples [B, C, L], and lengths says how many are each sound's own; None: all.
    """

    original: torch.Tensor
    reconstruction: torch.Tensor
    raw_original: torch.Tensor
    raw_reconstruction: torch.Tensor
    indices: Sequence[int]
    alpha: bool = False
    frames: int = 1
    lengths: Sequence[int] | None = None

    @cached_property
    def views(self) -> tuple[Pair, ...]:
        """The images that metrics of colour compare: of those with alpha composites on black and on white, rounded to
        8 bits; else the pair itself."""
        return tuple(self._over(grey) for grey in BACKGROUNDS) if self.alpha else (self,)

    @property
    def on_white(self) -> Pair:
        """The view that distances of whole sets take: one of each image."""
        return self.views[-1]

    def mean(self, measure: Callable[[Pair], torch.Tensor]) -> torch.Tensor:
        """The mean of a measure over the views."""
        return torch.stack([measure(view) for view in self.views]).mean(dim=0) if self.alpha else measure(self)

    def _over(self, grey: float) -> Pair:
        whole = [composite(one, grey, low=0.0).round() for one in (self.original, self.reconstruction)]
        raw = [composite(one, grey / 127.5 - 1) for one in (self.raw_original, self.raw_reconstruction)]
        return Pair(whole[0], whole[1], raw[0], raw[1], self.indices, frames=self.frames)

    @property
    def count(self) -> int:
        """Number of images, of clips of frames, that are measured."""
        return len(self.indices) * self.frames


@dataclass(frozen=True)
class Protocol:
    """The choices that change a number. PINNED is ours; no other is used unless it is asked for by name."""

    name: str
    version: int = 1
    posterior: Literal["mode", "sample"] = "mode"
    """Latent that is decoded: the mean, or one draw."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of the antialiased resize."""
    resize: Literal["bytes", "floats", "pillow"] = "bytes"
    """The resize: 8-bit pixels or floats by torchvision, or 8-bit pixels by Pillow."""
    rounding: Literal["round", "truncate", "truncate_half_up"] = "round"
    """Floats to 8 bits: round(127.5 x + 127.5), its floor, or floor(127.5 x + 128)."""
    psnr: Literal["quantised", "floats"] = "quantised"
    """Images that PSNR compares: 8-bit images, or clamped floats."""
    ssim: Literal["pinned", "range_of_image", "range_two", "uniform_window"] = "pinned"
    """See ldm_vae.metrics.ssim."""
    lpips: Literal["quantised", "floats"] = "quantised"
    """Images that LPIPS compares: 8-bit images, or the output as decoded, beyond [-1, 1] too."""
    source: str = ""
    """Source of the protocol."""

    def pair(
        self,
        original: torch.Tensor,
        reconstruction: torch.Tensor,
        indices: Sequence[int] | None = None,
        alpha: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Pair:
        """original and reconstruction [B, C, H, W] or [B, C, T, H, W], pixels in [-1, 1], or [B, C, L] => what metrics
        compare; lengths: samples of each sound."""
        indices, frames = range(len(original)) if indices is None else indices, original.shape[2:-2].numel()
        original, reconstruction = (frames_of(pixels).float() for pixels in (original, reconstruction))
        if original.ndim == 3:
            return Pair(original, reconstruction, original, reconstruction, indices, lengths=lengths)
        quantised = self.quantise(original), self.quantise(reconstruction)
        return Pair(*quantised, original, reconstruction, indices, alpha, frames)

    def quantise(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels in [-1, 1], or beyond => whole numbers 0..255, fp32."""
        if self.rounding == "round":
            return (pixels * 127.5 + 127.5).round().clamp(0, 255)
        offset = 127.5 if self.rounding == "truncate" else 128.0
        return (pixels * 127.5 + offset).clamp(0, 255).floor()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


PINNED = Protocol("ldm-vae", source="docs/evaluation.md")

# what well-known evaluations do, so that their published numbers can be looked for; never the default
VARIANTS = {
    variant.name: variant
    for variant in (
        Protocol(
            "eq-vae",
            version=2,  # 1 resized 8-bit pixels by torchvision
            posterior="sample",
            interpolation="bilinear",
            resize="floats",
            rounding="truncate_half_up",
            ssim="range_of_image",
            lpips="floats",
            source="zelaki/eqvae eval.py at 708ad80",
        ),
        Protocol(
            "lightningdit",
            version=2,  # 1 resized 8-bit pixels by torchvision
            posterior="sample",
            interpolation="bilinear",
            resize="floats",
            rounding="truncate_half_up",
            ssim="range_two",
            lpips="floats",
            source="hustvl/LightningDiT evaluate_tokenizer.py at 2725fed",
        ),
        Protocol(
            "lavinal712",
            version=2,  # 1 resized 8-bit pixels by torchvision
            posterior="sample",
            interpolation="bilinear",
            resize="pillow",
            rounding="truncate",
            psnr="floats",
            ssim="uniform_window",
            lpips="floats",
            source="lavinal712/AutoencoderKL eval.py at 33c92c0",
        ),
    )
}


def by_name(name: str) -> Protocol:
    """PINNED or a variant. Raises UsageError naming those that exist."""
    exist = {PINNED.name: PINNED, **VARIANTS}
    if name not in exist:
        raise UsageError(f"protocol: {not_among(name, exist)}")
    return exist[name]
