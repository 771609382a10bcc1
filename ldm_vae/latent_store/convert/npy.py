"""Arrays as the content of .npy files, from bytes that a stranger may have written: no pickles, no size believed."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt


def to_npy(values: npt.NDArray[Any]) -> bytes:
    """An array as the content of a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype at the beginning of a .npy file that is open. Raises ValueError if it is none, or no plain array
    of numbers in C order."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "iuf" or (fortran and len(shape) > 1) or min(shape, default=1) < 0:
        raise ValueError(f"expected numbers in C order, got {dtype}{' in Fortran order' if fortran else ''}")
    return shape, dtype


def from_npy(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file. Raises ValueError if it is not one, or its header does not fit its size."""
    file = io.BytesIO(data)
    shape, dtype = npy_header(file)
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError("its header does not fit its size")
    values: npt.NDArray[Any] = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    return values
