"""Memory does not grow with the dataset: what a loader holds is the keys and one permutation, whatever it has read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from ldm_vae.data.buckets import assign, generate
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.files import Names
from ldm_vae.data.quarantine import Bad
from ldm_vae.data.source import Record
from ldm_vae.data.transforms import TransformConfig


class Synthetic:
    """Pictures of 16 x 16 made when they are asked for."""

    columns: tuple[str, ...] = ()
    decoding = Decoding()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> Record:
        return Record(str(index), np.full((16, 16, 3), index % 256, dtype=np.uint8))


class SyntheticStream:
    """The same, in order only."""

    columns: tuple[str, ...] = ()
    decoding = Decoding()
    shuffle_buffer = 20

    def __init__(self, count: int) -> None:
        self.source = Synthetic(count)

    def __iter__(self) -> Iterator[Record | Bad]:
        return (self.source[index] for index in range(len(self.source)))


def peak_of(source: Any, batches: int, **more: Any) -> int:
    """Bytes that the loader came to hold at the most."""
    tracemalloc.start()
    try:
        loader = training_loader(source, TransformConfig(), 16, seed=0, batch_size=8, **more)
        for _ in islice(loader, batches):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_image_of_the_source_costs_its_place_in_the_permutation() -> None:
    peak_of(Synthetic(100), 3)  # imports and caches
    small, large = (peak_of(Synthetic(count), 3) for count in (10_000, 1_000_000))
    assert (large - small) / 990_000 < 6  # four bytes; keys are the source's business


@pytest.mark.slow
def test_an_image_that_was_read_is_forgotten() -> None:
    peak_of(Synthetic(100), 3)
    few, many = (peak_of(Synthetic(100_000), batches) for batches in (5, 300))
    assert many - few < 100_000  # the 2,400 images themselves are 1.8 MB
    few, many = (peak_of(SyntheticStream(100_000), batches) for batches in (5, 300))
    assert many - few < 100_000


def test_aspect_buckets_cost_a_few_bytes_an_image() -> None:
    shapes = generate(16 * 16, step=4)

    def peak(count: int) -> int:
        return peak_of(Synthetic(count), 3, buckets=assign(shapes, np.full((count, 2), 16, dtype=np.int32)))

    peak(100)
    small, large = peak(10_000), peak(200_000)
    assert (large - small) / 190_000 < 48


@pytest.mark.parametrize("length", [20, 60])
def test_names_take_their_bytes_and_one_number(length: int) -> None:
    names = Names(f"{index:0{length}d}" for index in range(10_000))
    tracemalloc.start()
    packed = Names(names)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(packed) == 10_000 and held / 10_000 < length + 9
