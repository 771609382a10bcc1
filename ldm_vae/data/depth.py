"""Depth of a picture file: the numbers that it stores, where Pillow gives others, and their range.

Pillow widens, narrows and reinterprets on the way (a PGM of 12 bits comes as 16, uint32 as int32, colour of 16 bits as
8), so that `value_range` in the file's own numbers would mean something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.data import arrays
from ldm_vae.data.arrays import Array
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.ranges import FIELD, Range, Values

_OTHER_DEPTH = re.compile(r";(?!8)\d")  # Pillow's raw modes: RGB;16B, L;4, BGR;15; but not L;8 or L;I
_BITS, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # TIFF 6.0, pages 29 and 80


@dataclass(frozen=True)
class Stored:
    """format of the file; raw: Pillow's raw mode; largest: the largest value of a PNM file that Pillow rescales, 0 of
    any other; bits and unsigned of a TIFF's numbers, 0 and False of any other."""

    format: str
    raw: str
    largest: int = 0
    bits: int = 0
    unsigned: bool = False


def stored(picture: Any) -> Stored:
    """Properties of a picture from its header, before it is loaded."""
    name, tiles = picture.format or "", getattr(picture, "tile", None)
    if not tiles:
        return Stored(name, "")
    decoder, arguments = tiles[0][0], tiles[0][3]
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    raw = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    largest = arguments[-1] if decoder in ("ppm", "ppm_plain") and isinstance(arguments[-1], int) else 0
    if name != "TIFF":
        return Stored(name, raw, largest)
    (bits, *_), (form, *_) = picture.tag_v2.get(_BITS, (1,)), picture.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    return Stored(name, raw, bits=int(bits), unsigned=form == _UNSIGNED)


def numbers(picture: Image.Image, stored: Stored) -> tuple[Array, Range | None]:
    """The numbers [H, W] of a loaded picture of mode I, I;16 or F, as its file has them; and their range, where the
    file says it and their type does not."""
    array = np.asarray(picture)
    if stored.format == "PPM" and picture.mode == "I":  # Pillow has stretched them to 16 bits
        largest = stored.largest or 65535
        return np.rint(array * (largest / 65535)).astype(np.uint16), (0.0, float(largest))
    if stored.format == "PNG" and picture.mode == "I":  # grey of 16 bits, before Pillow 11
        return array.astype(np.uint16), None
    if picture.mode == "I" and stored.bits == 32 and stored.unsigned:
        return array.view(np.uint32), None
    if stored.bits == 12:
        return array, (0.0, 4095.0)
    return array, None


def stretched(picture: Image.Image, stored: Stored, value_range: Range) -> tuple[Image.Image, Values]:
    """A loaded picture of 8 bits => the same with value_range as 0 to 255, alpha left alone; and the values it had.

    Raises:
        BadImage: its numbers are not those of the file (a palette, inks, another depth).
    """
    rescaled = stored.largest not in (0, 255) or bool(_OTHER_DEPTH.search(stored.raw))
    if picture.mode not in ("1", "L", "LA", "RGB", "RGBA") or (rescaled and picture.mode != "1"):
        what = stored.raw if rescaled else picture.mode
        raise BadImage(f"a {what} picture holds no numbers that {FIELD} could map: use grey, RGB of 8 bits or .npy")
    if "transparency" in picture.info and picture.mode in ("L", "RGB"):  # one colour: it would not be found afterwards
        picture = picture.convert("RGBA")
    if picture.mode == "1":
        picture = picture.convert("L").point([0] * 255 + [1])
    table = arrays.scaled_to_uint8(np.arange(256), value_range).tolist()
    alpha = list(range(256)) if picture.mode in ("LA", "RGBA") else []
    colours = len(picture.getbands()) - bool(alpha)
    seen = np.asarray(picture).reshape(picture.height, picture.width, -1)[:, :, :colours]
    return picture.point(table * colours + alpha), Values(int(seen.min()), int(seen.max()), *value_range)
