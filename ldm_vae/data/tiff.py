"""TIFFs that Pillow does not read, or reads as something else: by tifffile, which is optional.

More than four bands, numbers other than Pillow's modes (float16, int8, uint64, 16 bits beside an alpha), white as zero
at more than 8 bits (Pillow leaves it inverted). They become arrays, with all that holds for those (arrays.py).
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from ldm_vae.data.arrays import Array
from ldm_vae.data.quarantine import BadImage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
MOST = 2**31  # bytes of unpacked numbers
_WIDTH, _HEIGHT, _BITS, _COLOUR, _ORIENTATION, _BANDS, _FORMAT = 256, 257, 258, 262, 274, 277, 339  # TIFF 6.0, part 1
_KINDS = {1: "unsigned", 2: "signed", 3: "float", 5: "complex integer", 6: "complex float"}  # of _FORMAT
_TURNED = {  # [H, W, C] upright, by orientation
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
    8: lambda array: np.rot90(array),
}


def is_foreign(data: bytes) -> bool:
    """True for a TIFF that Pillow does not read as what it is."""
    if not data.startswith(MAGIC):
        return False
    if data.startswith(MAGIC[-1]):  # BigTIFF of that byte order
        return True
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as picture:
            tags: Any = getattr(picture, "tag_v2", {})
            return bool(tags.get(_COLOUR) == 0 and max(tags.get(_BITS, (1,))) > 8)
    except Image.DecompressionBombError:
        return False
    except Exception:  # unknown modes, in several types
        return _said(data) != ""  # a damaged one is Pillow's to refuse


def load(data: bytes) -> Array:
    """The first picture of the file as [H, W] or [H, W, C], upright, with black as the smaller number.

    Raises:
        BadImage: tifffile is not installed, or cannot read it either; the reason says what the file holds.
    """
    said = _said(data) or "64-bit offsets (BigTIFF)"
    try:
        import tifffile
    except ImportError as error:
        raise BadImage(f"a TIFF of {said}: needs tifffile (pip install 'ldm-vae[tiff]')") from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            if page.nbytes > MOST:  # before anything is allocated
                raise BadImage(f"a TIFF of {said}: {page.nbytes / 2**30:.1f} GiB, the limit is {MOST / 2**30:.0f}")
            array = np.asarray(page.asarray())
            axes, orientation = page.axes, int(page.tags.valueof(_ORIENTATION, 1))
            white_is_zero = page.photometric == 0
    except BadImage:
        raise
    except Exception as error:  # of damage, of a codec that is not installed
        raise BadImage(f"a TIFF of {said} that tifffile cannot read: {str(error).splitlines()[0][:120]}") from error
    if axes == "SYX":
        array = np.moveaxis(array, 0, 2)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise BadImage(f"a TIFF of {said}, axes {axes}: expected height, width and bands of real numbers")
    if white_is_zero and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    return np.ascontiguousarray(_TURNED[orientation](array) if orientation in _TURNED else array)


def _said(data: bytes) -> str:
    """Summary of the header: `64 x 48 pixels, 5 bands of 8 bits (unsigned)`; empty where there is none."""
    try:
        file = io.BytesIO(data)
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if data[2] == 43 else 8))
        file.seek(directory.next)
        directory.load(file)
        bits, kinds = directory.get(_BITS, (1,)), directory.get(_FORMAT, (1,))
        bands = directory.get(_BANDS, 1)
        deep = "/".join(map(str, sorted(set(bits))))
        kind = "/".join(_KINDS.get(kind, str(kind)) for kind in sorted(set(kinds)))
        return f"{directory[_WIDTH]} x {directory[_HEIGHT]} pixels, {bands} bands of {deep} bits ({kind})"
    except Exception:  # hostile bytes: any kind
        return ""
