"""Views: the crops of one decoded image. Mirror images are made where they are encoded, so only crops travel.

Legend: C channels, H W pixels of the image, R resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ldm_vae.autoencoder.geometry import geometry_of, step_of
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.data import buckets
from ldm_vae.data.decoding import DEFAULT, Decoding
from ldm_vae.data.flags import Resize
from ldm_vae.data.transforms import Crop, centre_crop, decoding_of
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import CORNERS, FLIP, crops_of

CORNER_SHARE = 7 / 8  # side of a corner crop relative to the centre crop's: 224 of 256, as in the five- and ten-crop

CROPS = ("", *CORNERS)
ViewSet = Literal["centre", "flip", "five_crop", "ten_crop"]
VIEW_SETS: dict[ViewSet, tuple[str, ...]] = {
    "centre": ("",),
    "flip": ("", FLIP),
    "five_crop": CROPS,
    "ten_crop": tuple(view for crop in CROPS for view in (crop, f"{crop}.{FLIP}".lstrip("."))),
}

Shape = tuple[int, int]


def cutting_of(identity: Identity, vae: Any) -> Cutting:
    """The crops that a store takes of each image.

    Raises:
        UsageError: the aspect buckets do not suit the VAE, or a draft does not suit the resize.
    """
    step = identity.bucket_step
    shapes = None
    if step is not None:
        if (side := geometry_of(vae).side) is not None:
            raise UsageError(
                f"buckets: {an(type(vae).__name__)} makes squares of {side} px of all shapes; leave it out"
            )
        shapes = tuple(bucket_shapes(side, step, step_of(vae)) for side in identity.resolution)
    decoding = decoding_of_store(identity)
    if decoding.resize == "none" and decoding.jpeg_draft:
        raise UsageError("jpeg_draft: decodes at another size, and resize is none: pixels are taken as they are")
    return Cutting(identity.resolution, crops_of(identity.views), shapes, decoding.resize, decoding.alpha)


def decoding_of_store(identity: Identity) -> Decoding:
    """The decoding of a store's images; the default of another program's."""
    return decoding_of(identity.preprocessing) or DEFAULT


def bucket_shapes(resolution: int, step: int, factor: int) -> tuple[Shape, ...]:
    """Aspect buckets (height, width) of about R x R pixels, in steps of `step`, no side more than twice the other.

    Raises:
        UsageError: the step is not a multiple of the downsampling factor f, or too large for the resolution.
    """
    if step < 1 or step % factor:
        raise UsageError(f"buckets: expected a step that is a multiple of f = {factor}, got {step}")
    return tuple(buckets.generate(resolution * resolution, step))


@dataclass(frozen=True)
class Cutting:
    """image => its crops: for each resolution each crop. Given to the decoding workers, so one decode serves all."""

    resolutions: tuple[int, ...]
    crops: tuple[str, ...] = ("",)
    buckets: tuple[tuple[Shape, ...], ...] | None = None
    """Per resolution the shapes to choose from; None is a square."""
    resize: Resize = "short_side"
    alpha: bool = False

    def __call__(self, image: torch.Tensor, original_size: Shape) -> tuple[Crop, ...]:
        """uint8 [C, H, W] => len(resolutions) * len(crops) crops, resolution by resolution."""
        return tuple(
            _cut(image, self._shape(number, original_size), crop, original_size, self.resize, self.alpha)
            for number in range(len(self.resolutions))
            for crop in self.crops
        )

    @property
    def at_least(self) -> int:
        """Short side of an image, in pixels, from which no crop has to be enlarged: what a JPEG's draft must have."""
        shapes = [shape for per_resolution in self.buckets or () for shape in per_resolution]
        side = max(self.resolutions) if self.buckets is None else max(max(shape) for shape in shapes)
        return side if self.crops == ("",) else math.ceil(side / CORNER_SHARE)

    def _shape(self, number: int, original_size: Shape) -> Shape:
        if self.buckets is None:
            return self.resolutions[number], self.resolutions[number]
        shapes = self.buckets[number]
        return shapes[int(buckets.assign(shapes, np.array([original_size])).bucket[0])]


def _cut(image: torch.Tensor, shape: Shape, crop: str, original_size: Shape, resize: Resize, alpha: bool) -> Crop:
    if not crop:
        return centre_crop(image, shape, original_size, resize, alpha)
    height, width = image.shape[1:]
    # image pixels per crop pixel: those of the largest crop that fits, times its share
    shrink = CORNER_SHARE * min(height / shape[0], width / shape[1])
    if resize == "none":
        shrink = min(1.0, shrink)
    rows, columns = max(1, round(shape[0] * shrink)), max(1, round(shape[1] * shrink))
    top = 0 if crop.startswith("top") else height - rows
    left = 0 if crop.endswith("left") else width - columns
    cut = centre_crop(image[:, top : top + rows, left : left + columns], shape, None, resize, alpha)
    # back to the original's pixels, where a JPEG's draft decoded fewer
    down, across = original_size[0] / height, original_size[1] / width
    box = (round(top * down), round(left * across), round(rows * down), round(columns * across))
    return Crop(cut.pixels, original_size, box)
