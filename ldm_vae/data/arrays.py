"""Arrays as images: .npy files and datasets' array columns, of any number of channels and any number type.

For images that no picture format holds: satellite bands, CT slices, spectrograms. Everything becomes uint8, as
photographs are: by the range of its type (ranges.py), or by `value_range`. What neither tells is refused.

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.ranges import FIELD, Range, Values, own_range

Array = np.ndarray[Any, Any]

MAGIC = b"\x93NUMPY"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")


def load_npy(data: bytes) -> Array:
    """The array in the bytes of a .npy file. Raises BadImage for objects, and for a header larger than its file."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise BadImage("a .npy of Python objects is never loaded")
        # checked before numpy allocates what the header asks for
        if int(np.prod(shape, dtype=object)) * dtype.itemsize > len(data):
            raise BadImage(f"the .npy header says {shape} of {dtype}, more than the file holds")
        file.seek(0)
        loaded: Array = np.load(file, allow_pickle=False)
    except BadImage:
        raise
    except Exception as error:  # numpy parses the header as Python: any kind of error can come out of it
        raise BadImage(f"not a readable .npy file: {error}") from error
    return loaded


def from_array(
    array: Array,
    channels: int,
    value_range: Range | None = None,
    curve: Array | None = None,
    alpha: bool = False,
) -> tuple[torch.Tensor, Values]:
    """[H, W], [H, W, C] or [C, H, W] of any number type => uint8 [C, H, W], and the values that it was made of.

    Args:
        array: bool is 0 and 1, uint8 and uint16 are taken over their whole range, floats in [0, 1]; other integers
            need `value_range`.
        channels: one channel is repeated to three, three become one by ITU-R 601 luma; other differences are refused.
        value_range: the values that become 0 and 255, of any type; outside of them is clipped.
        curve: [256], level 0 to 255 => that in sRGB; between two levels straight.
        alpha: the fourth channel is alpha (of the same range as the others), which grey and colour without it get.

    Raises:
        BadImage: another shape, NaN or Inf, floats outside of [0, 1] or integers without a range.
    """
    scaled, values = _to_uint8(_height_width_channels(array, channels), value_range, curve)
    have = scaled.shape[2]
    if alpha and have in (1, 3):
        opaque = np.full_like(scaled[:, :, :1], 255)
        scaled = np.concatenate([*[scaled] * (3 // have), opaque], axis=2)
    elif have == 1 and channels == 3:
        scaled = np.repeat(scaled, 3, axis=2)
    elif have == 3 and channels == 1:
        scaled = np.rint(scaled @ np.array(_LUMA)).astype(np.uint8)[:, :, None]
    elif have != channels:
        raise BadImage(f"has {have} channels, expected {channels}")
    return torch.from_numpy(np.ascontiguousarray(scaled)).permute(2, 0, 1), values


def scaled_to_uint8(array: Array, value_range: Range, curve: Array | None = None) -> Array:
    """Numbers => uint8 of the same shape: value_range becomes 0 to 255, outside is clipped; then the curve."""
    low, high = value_range
    scaled: Array = ((array.astype(np.float64) - low) * (255.0 / (high - low))).clip(0, 255)
    if curve is not None:  # before rounding: of a linear curve's shadows 8 bits would keep one level in 13
        scaled = np.interp(scaled, np.arange(256), curve)
    rounded: Array = np.rint(scaled).astype(np.uint8)
    return rounded


def _height_width_channels(array: Array, channels: int) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"an array of shape {array.shape} is not an image ([H, W], [H, W, C] or [C, H, W])")
    wanted = (channels, 1, 3)
    last, first = array.shape[2], array.shape[0]
    if last != channels and first in wanted and (first == channels or last not in wanted):
        array = np.moveaxis(array, 0, 2)
    return array


def _to_uint8(array: Array, value_range: Range | None, curve: Array | None) -> tuple[Array, Values]:
    if array.dtype.kind not in "buif":
        raise BadImage(f"numbers of type {array.dtype} are not pixels")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadImage("holds NaN or Inf")
    low, high = array.min().item(), array.max().item()
    black, white = value_range or _assumed_range(array.dtype, low, high)
    values = Values(low, high, black, white)
    if array.dtype == np.uint8 and curve is None and (black, white) == (0, 255):
        return array, values
    if array.dtype.itemsize > 1:
        return scaled_to_uint8(array, (black, white), curve), values
    every = np.arange(256, dtype=np.uint8).view(np.int8 if array.dtype == np.int8 else np.uint8)
    # a table: no float for every pixel
    return scaled_to_uint8(every, (black, white), curve)[array.view(np.uint8)], values


def _assumed_range(dtype: np.dtype[Any], low: float, high: float) -> Range:
    own = own_range(dtype)
    if own is None:
        raise BadImage(f"{dtype} says nothing about black and white, and this spans [{low}, {high}]: set {FIELD}")
    if dtype.kind == "f" and (low < -1e-3 or high > 1.001):
        raise BadImage(f"floats are read as [0, 1] and these span [{low:g}, {high:g}]: set {FIELD}")
    return own
