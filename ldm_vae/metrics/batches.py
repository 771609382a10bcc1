"""Images, clips and sounds for a metric: the good ones of a source in order, each on one rank exactly once, images
cropped by the protocol.

Legend: B batch, C channels, T frames, R side of an image, L samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.ordered import ordered_loader
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.source import Source
from ldm_vae.data.stream import Stream
from ldm_vae.data.transforms import Crop
from ldm_vae.metrics.protocol import PINNED, Protocol


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size; indices and keys of each in its source; pixels uint8 [B, C, R, R], of clips [B, C, T, R, R],
    or fp32 on the same scale where the protocol resizes floats; alpha: the fourth channel is straight alpha. Of sounds
    samples fp32 [B, C, L], of which `lengths` are each sound's own, the others silence behind it."""

    indices: Sequence[int]
    keys: Sequence[str]
    pixels: torch.Tensor
    alpha: bool = False
    lengths: Sequence[int] | None = None


def share_of(rank: int, world_size: int, indices: Sequence[int], batch_size: int) -> Sequence[int]:
    """This rank's part of `indices`: a run of whole batches, so that batches are the same for any number of ranks."""
    batches = -(-len(indices) // batch_size)
    first, last = rank * batches // world_size, (rank + 1) * batches // world_size
    return indices[first * batch_size : last * batch_size]


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `total`, evenly spread from the first on."""
    count = min(total, wanted)
    return [place * total // count for place in range(count)]


def some_of(source: Source | Stream, wanted: int) -> Sequence[int] | None:
    """Indices for `image_batches`: `wanted` of a source, evenly spread, or None for a stream, which has no indices."""
    return None if isinstance(source, Stream) else spread(len(source), wanted)


def size_of(decoding: Decoding, resolution: int | None) -> int:
    """R of images and clips, L of excerpts of sounds. Raises UsageError where that is missing, or R is of sounds."""
    if decoding.signal == "audio":
        if decoding.samples is None:
            raise UsageError("samples: expected the samples of an excerpt of a sound (`--excerpt N`), got none")
        if resolution is not None:
            raise UsageError(f"resolution: {resolution} is of images, and sounds have excerpts; leave it out")
        return decoding.samples
    if resolution is None:
        raise UsageError("resolution: expected the side of the crops in pixels, got none")
    return resolution


def check_images(source: Source | Stream, why: str) -> None:
    """Raises UsageError for a source of clips, where images alone do; `why` is the rest of the sentence."""
    if source.decoding.frames is not None:
        raise UsageError(f"frames: {why}; leave it out")


def image_batches(
    source: Source | Stream,
    indices: Sequence[int] | None,
    resolution: int,
    *,
    batch_size: int,
    num_workers: int = 0,
    quarantine: Quarantine | None = None,
    protocol: Protocol = PINNED,
) -> Iterator[ImageBatch]:
    """The usable images or clips among `indices` (all if None), in order, resized and centre-cropped to `resolution` as
    the protocol says, or excerpts of sounds, which have a length of their own; the others go to `quarantine`.

    Raises:
        UsageError: a protocol's own resize, of a source that is not resized, has alpha or is of clips or
            sounds.
    """
    views = {"bytes": None, "floats": resized_floats, "pillow": resized_by_pillow}
    chosen = views[protocol.resize]
    if chosen is not None and source.decoding.resize == "none":
        raise UsageError(
            "resize: is none (the pixels as they are), and the protocol resizes the short side; --resize short_side "
            "or the pinned protocol would do"
        )
    if chosen is not None and source.decoding.alpha:
        raise UsageError(f"protocol: {protocol.name} is for images without alpha; the pinned protocol would do")
    if chosen is not None and source.decoding.frames is not None:
        raise UsageError(
            f"protocol: {protocol.name} is for images, and frames makes clips; the pinned protocol would do"
        )
    of_sounds = source.decoding.signal == "audio"
    if protocol != PINNED and of_sounds:
        raise UsageError(f"protocol: {protocol.name} is for images, and these are sounds; the pinned protocol would do")
    view = None if chosen is None else functools.partial(chosen, resolution=resolution)
    for samples, bad in ordered_loader(
        source, resolution, indices, batch_size=batch_size, num_workers=num_workers, view=view
    ):
        if quarantine is not None:
            quarantine.add(bad, good=len(samples))
        # images among clips have another shape: batches of their own
        for _, group in itertools.groupby(samples, lambda sample: sample.crop.pixels.shape):
            alike = list(group)
            yield ImageBatch(
                [sample.index for sample in alike],
                [sample.key for sample in alike],
                torch.stack([sample.crop.pixels for sample in alike]),
                source.decoding.alpha,
                [sample.crop.box[3] for sample in alike] if of_sounds else None,
            )


def resized_floats(image: torch.Tensor, original_size: tuple[int, int], resolution: int) -> tuple[Crop, ...]:
    """torchvision's ToTensor, Resize, CenterCrop: bilinear and antialiased, of floats, which are not rounded; here on
    the scale 0..255."""
    short = functional.resize(image.float(), [resolution], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return _centre(short, original_size, resolution)


def resized_by_pillow(image: torch.Tensor, original_size: tuple[int, int], resolution: int) -> tuple[Crop, ...]:
    """torchvision's Resize, CenterCrop of a Pillow image: bilinear and antialiased by Pillow, which rounds to bytes."""
    height, width = image.shape[1:]
    short = min(height, width)
    size = (int(resolution * width / short), int(resolution * height / short))
    bands = [Image.fromarray(band.contiguous().numpy()).resize(size, Image.Resampling.BILINEAR) for band in image]
    return _centre(torch.from_numpy(np.stack([np.asarray(band) for band in bands])), original_size, resolution)


def _centre(short: torch.Tensor, original_size: tuple[int, int], resolution: int) -> tuple[Crop, ...]:
    cropped = functional.center_crop(short, [resolution, resolution])
    height, width = original_size
    side = min(height, width)
    return (Crop(cropped, original_size, ((height - side) // 2, (width - side) // 2, side, side)),)
