"""Pictures for the page: embedded losslessly, and what is computed from a pair: the difference and the error map.

A film, the frames of a clip, is one picture with one frame below the other: the page's script shows them one at a time,
all films of a page the same, and a browser without it shows the first. Films of many pixels are compressed, and of very
many made smaller (`fitted`), so that the page stays below some tens of megabytes.

Legend: T frames, H W pixels of a frame.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float64]

GAP = 2  # pixels between the parts of a strip
POSITIVE, NEGATIVE = (59, 125, 235), (226, 112, 32)  # readable on white and on black
# dark to light through violet and orange: readable in both schemes, ordered in grey too
STOPS = ((13, 12, 34), (63, 15, 92), (133, 32, 106), (205, 65, 73), (247, 133, 60), (252, 208, 110), (252, 253, 215))


# pixels of all originals and reconstructions of a gallery together; maps, at most thrice as many, are compressed
LOSSLESS_PIXELS = 2**21  # 6 MB of noise, half of that of videos
MOST_PIXELS = 2**25  # at quality 90 about 10 MB
TALLEST = 16383  # pixels of a WebP


@dataclass(frozen=True)
class Film:
    """Form of a picture on the page: its frames T, the divisor of their sides, and whether all values are kept."""

    frames: int = 1
    divisor: int = 1
    lossless: bool = True


PICTURE = Film()


def film_of(path: Path, pixels: int = 0) -> Film:
    """The form of a picture file, one of those that have so many pixels together."""
    with Image.open(path) as image:
        return fitted(getattr(image, "n_frames", 1), image.height, pixels)


def fitted(frames: int, height: int, pixels: int) -> Film:
    """The form of films of so many frames of a height, which have so many pixels together; images are kept whole."""
    if frames == 1:
        return PICTURE
    divisor = max(1, math.ceil(math.sqrt(pixels / MOST_PIXELS)), math.ceil(frames * height / TALLEST))
    return Film(frames, divisor, pixels <= LOSSLESS_PIXELS)


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which a record gives, in a folder. Raises ValueError if it lies elsewhere, by `..`, by a
    link or by an absolute path: a page is sent to others, with all that it shows."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder")
    return path


def read_pixels(path: Path) -> Pixels:
    """A PNG => [H, W, 3], an animated one => [T*H, W, 3], 0..255."""
    with Image.open(path) as image:
        return np.asarray(_below_each_other(image, "RGB"), dtype=np.float64)


def _below_each_other(image: Image.Image, mode: str) -> Image.Image:
    """All frames of an open picture as one picture."""
    count = getattr(image, "n_frames", 1)
    tall = Image.new(mode, (image.width, count * image.height))
    for number in range(count):
        image.seek(number)
        tall.paste(image.convert(mode), (0, number * image.height))
    return tall


def read_map(path: Path) -> Pixels:
    """A PNG of one channel, 8 bits or 16 => [H, W], 0..1."""
    with Image.open(path) as image:
        values = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    return values.astype(np.float64) / (255 if values.dtype == np.uint8 else 65535)


def embed(path: Path, film: Film = PICTURE) -> str:
    """A picture file as a data URI, pixel for pixel unless the film's form says otherwise; WebP is a quarter smaller
    than PNG."""
    with Image.open(path) as image:
        return _uri(_below_each_other(image, "RGBA" if image.mode == "RGBA" else "RGB"), film)


def cut_out(path: Path, boxes: Sequence[tuple[int, int, int, int]]) -> str:
    """Parts (left, top, width, height) of a picture file beside each other. Raises ValueError for one that lies outside
    of it, or has another size than the first."""
    _, _, width, height = boxes[0]
    with Image.open(path) as image:
        if any(min(box) < 0 or box[0] + width > image.width or box[1] + height > image.height for box in boxes):
            raise ValueError(f"{path.name}: a part lies outside of its {image.width} x {image.height} pixels")
        strip = Image.new("RGBA", (len(boxes) * (width + GAP) - GAP, height))
        for place, (left, top, *_) in enumerate(boxes):
            strip.paste(image.convert("RGBA").crop((left, top, left + width, top + height)), (place * (width + GAP), 0))
    return _uri(strip)


def difference(original: Pixels, reconstruction: Pixels, reach: float, film: Film = PICTURE) -> str:
    """Difference image around grey: what the reconstruction has too much is lighter, too little darker; black and white
    are `reach` grey levels."""
    values = 128 + (127 / reach) * (reconstruction - original)
    return _uri(Image.fromarray(values.round().clip(0, 255).astype(np.uint8)), _map_form(values, film))


def signed_map(values: Pixels) -> str:
    """[H, W] from -1 to 1 => POSITIVE and NEGATIVE, as opaque as the value is large."""
    colours = np.where(values[..., None] >= 0, POSITIVE, NEGATIVE)
    opacity = (255 * np.abs(values)).round().clip(0, 255)[..., None]
    return _uri(Image.fromarray(np.concatenate([colours, opacity], axis=2).astype(np.uint8)))


def error(original: Pixels, reconstruction: Pixels) -> Pixels:
    """Absolute error in grey levels, averaged over colours: [H, W]."""
    mean: Pixels = np.abs(reconstruction - original).mean(axis=2)
    return mean


def heat_map(values: Pixels, largest: float, film: Film = PICTURE) -> str:
    """[H, W] => STOPS from 0 to `largest`."""
    level = (values / max(largest, 1e-9)).clip(0, 1) * (len(STOPS) - 1)
    places = np.arange(len(STOPS))
    channels = [np.interp(level, places, [stop[channel] for stop in STOPS]) for channel in range(3)]
    colours = np.stack(channels, axis=2).round().astype(np.uint8)
    return _uri(Image.fromarray(colours), _map_form(values, film))


def _map_form(values: Pixels, film: Film) -> Film:
    """Maps of large pictures and of films are shown, not read off."""
    return replace(film, lossless=film.frames == 1 and len(values) <= 128)


def _uri(image: Image.Image, film: Film = PICTURE) -> str:
    file = io.BytesIO()
    if film.divisor > 1:  # frame by frame, so that none bleeds into the next
        height = image.height // film.frames
        frames = [image.crop((0, top, image.width, top + height)) for top in range(0, image.height, height)]
        small = [frame.reduce(film.divisor) for frame in frames]
        image = Image.new(image.mode, (small[0].width, film.frames * small[0].height))
        for number, frame in enumerate(small):
            image.paste(frame, (0, number * frame.height))
    options: dict[str, Any] = {"lossless": True, "method": 4, "exact": True} if film.lossless else {"quality": 90}
    image.save(file, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
