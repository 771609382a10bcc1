"""Keyed randomness: a draw depends on what it is for, never on who drew before it.

Global generators make a run depend on the number of processes, workers and resumes. Here every draw names its seed,
its stream ("augmentation", "posterior", ...) and its coordinates (epoch, sample index, position in the global stream of
images); the same key gives the same numbers on every machine. Philox is counter based: key and counter are all of its
state (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@cache
def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def generator(seed: int, stream: str, *coordinates: int) -> np.random.Generator:
    """A numpy generator for one draw; at most three non-negative coordinates, such as (epoch, index)."""
    counter = [0, *coordinates, *[0] * (3 - len(coordinates))]  # word 0 is left to the generator itself
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, _stream_key(stream)], counter=counter))


def normal(seed: int, stream: str, keys: Iterable[int | Sequence[int]], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, fp32 [len(keys), *shape], each row drawn by its own key (a coordinate or several)."""
    import torch

    rows = []
    for key in keys:
        coordinates = (key,) if isinstance(key, int | np.integer) else tuple(key)
        rows.append(generator(seed, stream, *map(int, coordinates)).standard_normal(tuple(shape), dtype=np.float32))
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights inside the block from this seed; the global generator is left as it was. No GPU's generator
    is asked for: that would give every GPU of the machine a CUDA context of every process."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
