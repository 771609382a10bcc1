"""The stream of images: each exactly once an epoch over all ranks, the same for any number of processes."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_vae.data.sampler import Order, Task, batches, permutation


def test_permutation_is_one_and_depends_on_seed_and_epoch() -> None:
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert order.dtype == np.uint32
    assert len({order.tobytes() for order in orders}) == 4
    assert (permutation(0, 1, 1000) == orders[1]).all()


def flat(count: int, batch_size: int, world_size: int, start: int, steps: int) -> list[Task]:
    """The global stream, put together from what each rank gets."""
    ranks = [
        list(
            islice(
                batches(Order(3, count), batch_size=batch_size, rank=rank, world_size=world_size, start_position=start),
                steps,
            )
        )
        for rank in range(world_size)
    ]
    return [task for step in range(steps) for rank in range(world_size) for task in ranks[rank][step].tasks]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 50),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 5),
    start=st.integers(0, 120),
)
def test_every_layout_reads_the_same_stream(count: int, batch_size: int, world_size: int, start: int) -> None:
    steps = 2 + 3 * count // (batch_size * world_size)
    tasks = flat(count, batch_size, world_size, start, steps)
    order = Order(3, count)
    assert tasks == [order.task(position) for position in range(start, start + len(tasks))]
    whole = order.count * -(-start // order.count)  # the first epoch that lies wholly in what was read
    if whole + count <= start + len(tasks):
        epoch = [task.index for task in tasks[whole - start : whole - start + count]]
        assert sorted(epoch) == list(range(count))


def test_resume_with_another_layout_goes_on_in_the_same_stream() -> None:
    straight = flat(37, 4, 1, 0, 12)
    first = flat(37, 2, 3, 0, 3)
    rest = flat(37, 5, 2, 18, 3)
    assert first + rest == straight


def test_a_dataset_smaller_than_the_world() -> None:
    tasks = flat(2, 3, 4, 0, 2)
    assert [task.position for task in tasks] == list(range(24))
    assert all(sorted(task.index for task in tasks[at : at + 2]) == [0, 1] for at in range(0, 24, 2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_epochs_advance(count: int) -> None:
    tasks = flat(count, 4, 1, 0, 1)
    assert [task.epoch for task in tasks] == [position // count for position in range(4)]
