"""Geometry: a decoded image => one crop of the trained size, and the map between uint8 and [-1, 1].

Resizing is torchvision v2's bicubic with antialiasing on uint8 (4.5x faster than Pillow's, within one grey level, the
same at any number of threads).

Legend: C channels, H W pixels of the image, R the resolution of the crop.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ldm_vae.core.config import Section
from ldm_vae.data.alpha import resampled
from ldm_vae.data.decoding import DEFAULT, Decoding
from ldm_vae.data.flags import Resize

PREPROCESSING_VERSION = "1"  # changes with every change of the pixels that `centre_crop(decode(...))` gives

Resolution = int | tuple[int, int]  # R, or (height, width)
Box = tuple[int, int, int, int]


def preprocessing_identity(decoding: Decoding = DEFAULT) -> str:
    """Preprocessing identity that a latent store compares: equal identities mean equal pixels."""
    changed = [
        f"{name}={getattr(decoding, name)!r}"
        for name in decoding.__dataclass_fields__
        if getattr(decoding, name) != getattr(DEFAULT, name)
    ]
    return " ".join([PREPROCESSING_VERSION, *changed])


def decoding_of(identity: str) -> Decoding | None:
    """The decoding that an identity names; None for one that this version cannot repeat, or of another program."""
    version, _, changed = identity.partition(" ")
    named = re.findall(r"(\w+)=(.*?)(?= \w+=|$)", changed)
    try:
        found = Decoding(**{name: ast.literal_eval(value) for name, value in named})
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return found if version == PREPROCESSING_VERSION and preprocessing_identity(found) == identity else None


@dataclass(frozen=True)
class Crop:
    """One crop: pixels uint8 [C, R, R], of a clip [C, T, R, R], of a sound float32 [C, L] (a row of height 1);
    original_size (H, W) of the image upright; box (top,
    left, height, width) of the crop in the original's pixels; whether it was mirrored. SDXL's micro-conditioning is
    made of these."""

    pixels: torch.Tensor
    original_size: tuple[int, int]
    box: Box
    flipped: bool = False


class TransformConfig(Section):
    """Settings of training crops. The defaults show the model what `ldm-vae encode` will show it, whole images at the
    resolution, with as much variation as that leaves."""

    crop: Literal["random", "centre"] = "random"
    """Where the crop lies: anywhere (keyed by seed, epoch and index), or in the centre."""
    resize: Resize = "short_side"
    """short_side: the crop is as large a part of the image as fits, and is resized, so photographs of any size are seen
    at the scale they will be encoded at. none: pixels are taken as they are (texture, tiles, medical and satellite
    images, where the scale means something); only images smaller than the resolution are enlarged."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Short side of the resized image relative to the resolution, drawn log-uniformly between these two for every crop:
    (1, 2) shows whole images and halves of them. Only with resize: short_side."""
    flip: bool = True
    """Mirror every second crop (switch off for text, or where left and right differ)."""

    @model_validator(mode="after")
    def _check(self) -> TransformConfig:
        low, high = self.scale
        if not 1.0 <= low <= high:
            raise ValueError(f"scale: expected 1 <= min <= max, got {self.scale}")
        if self.resize == "none" and self.scale != (1.0, 1.0):
            raise ValueError("scale: has no effect with resize: none")
        return self


def centre_crop(
    image: torch.Tensor,
    resolution: Resolution,
    original_size: tuple[int, int] | None = None,
    resize: Resize = "short_side",
    alpha: bool = False,
) -> Crop:
    """uint8 [C, H, W] => Crop: the protocol of evaluation and encoding.

    The short side is resized to R (the long side to int(R * long / short), as torchvision's Resize), then the centre is
    cut out (as torchvision's CenterCrop). For a (height, width) the image is resized until it covers it.

    Args:
        original_size: (H, W) of the image in its file, where jpeg_draft decoded it smaller.
        resize: `none` cuts pixels as they are out of the centre, exactly as training's centre crops without resize.
        alpha: the fourth channel is straight alpha, by which colour is weighted in resizing.
    """
    if resize == "none":
        return _cut(image, _height_width(resolution), 1.0, (0.5, 0.5), original_size, alpha)
    rows, columns = _height_width(resolution)
    height, width = image.shape[1:]
    # crop pixels per image pixel that just cover the crop; the longer side overlaps and is cut
    zoom = max(rows / height, columns / width)
    if rows / height >= columns / width:
        new_height, new_width = rows, max(columns, int(rows * width / height))
    else:
        new_height, new_width = max(rows, int(columns * height / width)), columns
    # rounded as torchvision's CenterCrop rounds
    top, left = round((new_height - rows) / 2), round((new_width - columns) / 2)
    resized = _resize(image, new_height, new_width, alpha)[:, top : top + rows, left : left + columns]
    box = (top / zoom, left / zoom, rows / zoom, columns / zoom)
    return Crop(resized, original_size or (height, width), _in_original(box, (height, width), original_size))


def random_crop(
    image: torch.Tensor,
    resolution: Resolution,
    config: TransformConfig,
    generator: np.random.Generator,
    original_size: tuple[int, int] | None = None,
    alpha: bool = False,
) -> Crop:
    """uint8 [C, H, W] => Crop, as `config` says: a box in whole pixels of the image, resized to the resolution.

    Cut first, resized after: fewer pixels to resize, and the box of the micro-conditioning is exact.

    Args:
        generator: gives four numbers, always the same four, so that one option does not change another's draw.
        original_size, alpha: as in `centre_crop`.
    """
    rows, columns = _height_width(resolution)
    height, width = image.shape[1:]
    # all four drawn, needed or not: switching an option on must not move the others' draws
    u_scale, u_top, u_left, u_flip = generator.random(4)
    if config.resize == "none":
        shrink = 1.0
    else:
        low, high = config.scale
        cover = min(height / rows, width / columns)  # image pixels per crop pixel where the crop is as large as fits
        # log-uniform: as many crops between 1 and sqrt(2) as between sqrt(2) and 2
        shrink = cover / math.exp(math.log(low) + u_scale * (math.log(high) - math.log(low)))
    if config.crop == "centre":
        u_top = u_left = 0.5
    crop = _cut(image, (rows, columns), shrink, (u_top, u_left), original_size, alpha)
    flipped = bool(config.flip and u_flip < 0.5)
    return replace(crop, pixels=crop.pixels.flip(2), flipped=True) if flipped else crop


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """uint8, or fp32 on its scale (then in place), => float32 in [-1, 1], any shape."""
    return image.float().div_(127.5).sub_(1.0)  # in place: 5x faster on a CPU than three fresh buffers


def to_values(batch: torch.Tensor) -> torch.Tensor:
    """Batch of a loader => what networks take: images [B, C, H, W] and clips [B, C, T, H, W] as `to_pixels`, samples of
    sounds float32 [B, C, L] as they are."""
    return batch if batch.ndim == 3 else to_pixels(batch)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1], clamped => uint8, any shape. Rounded: it restores all 256 values, truncation breaks 63 of them."""
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _height_width(resolution: Resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _cut(
    image: torch.Tensor,
    shape: tuple[int, int],
    shrink: float,
    place: tuple[float, float],
    original_size: tuple[int, int] | None,
    alpha: bool,
) -> Crop:
    """A box in whole pixels, `shrink` image pixels per crop pixel but no larger than fits, resized to `shape`.

    place: where it lies of where it can lie, from 0 (top, left) to 1.
    """
    (rows, columns), (height, width) = shape, image.shape[1:]
    shrink = min(shrink, height / rows, width / columns)
    box_height = min(height, max(1, round(rows * shrink)))
    box_width = min(width, max(1, round(columns * shrink)))
    # each whole-pixel place is equally likely
    top = min(int(place[0] * (height - box_height + 1)), height - box_height)
    left = min(int(place[1] * (width - box_width + 1)), width - box_width)
    pixels = _resize(image[:, top : top + box_height, left : left + box_width], rows, columns, alpha)
    box = _in_original((top, left, box_height, box_width), (height, width), original_size)
    return Crop(pixels, original_size or (height, width), box)


def _in_original(
    box: tuple[float, float, float, float], size: tuple[int, int], original_size: tuple[int, int] | None
) -> Box:
    height, width = original_size or size
    down, across = height / size[0], width / size[1]
    top, left = min(round(box[0] * down), height - 1), min(round(box[1] * across), width - 1)
    return top, left, min(round(box[2] * down), height - top), min(round(box[3] * across), width - left)


def _planar(image: torch.Tensor) -> torch.Tensor:
    """The same, contiguous; numpy picks every fourth byte twice as fast as torch does."""
    return image if image.is_contiguous() else torch.from_numpy(np.ascontiguousarray(image.numpy()))


def _resize(image: torch.Tensor, height: int, width: int, alpha: bool) -> torch.Tensor:
    """uint8 [C, H, W] => uint8 [C, height, width], contiguous, bicubic, antialiased."""
    channels = image.shape[0]
    if tuple(image.shape[1:]) == (height, width):
        return _planar(image)
    if channels == 3 and image.stride(0) == 1 and image.stride(2) == 4 and image.storage_offset() % 4 == 0:
        # Pillow's four bytes a pixel (decoding.py): torch's kernel takes them as they lie, 5x faster than three of four
        image = image.as_strided((4, *image.shape[1:]), image.stride())

    def resize(pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional.resize(
            pixels, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return found

    if alpha:  # in floats: premultiplied and rounded to 8 bits, a faint pixel would keep no colour
        return (resampled(image / 255, resize) * 255).round().to(torch.uint8)
    resized = resize(image)
    return _planar(resized[:channels])
