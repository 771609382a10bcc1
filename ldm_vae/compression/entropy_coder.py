"""Entropy coders of the package `constriction` (extra `compress`), and the conditions under which a decoder computes
the encoder's probabilities to the last bit.

Rounding differs between versions of torch, instruction sets, numbers of threads and batch shapes. The last two are
pinned here; the first two are recorded in the file, and the checksum of the content tells whether they mattered.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm_vae.core.errors import WorkError

Words = npt.NDArray[np.uint32]
Symbols = npt.NDArray[np.int32]

MOST_BITS = 24  # of a symbol: constriction's probabilities are multiples of 2^-24, and none is 0


class OtherContentError(Exception):
    """A code that decodes to something else than was encoded."""


@dataclass(frozen=True)
class Code:
    """Encoded images. words: of 32 bits; seed: words that a stack began with, of which the first `kept` were never
    touched and are left out; content: SHA-256 of what comes back to the bit."""

    words: Words
    content: str
    seed: int = 0
    kept: int = 0


def coders() -> ModuleType:
    """constriction's `stream`. Raises WorkError where it is not installed."""
    try:
        from constriction import stream
    except ImportError as error:
        raise WorkError("compress and decompress need constriction: pip install 'ldm-vae[compress]'") from error
    found: ModuleType = stream
    return found


def categorical() -> Any:
    """The model of symbols from 0, by a row of probabilities fp64 each."""
    return coders().model.Categorical(perfect=False)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """One thread, without gradients: sums are then taken in one order, whatever OMP_NUM_THREADS says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    """Versions and machine that rounding depends on, beside the code and the networks."""
    return {
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "constriction": importlib.metadata.version("constriction"),
    }


def content_of(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of tensors: shape and bytes of each."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
