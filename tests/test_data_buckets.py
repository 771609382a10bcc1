"""Aspect buckets: shapes, assignment, one shape a batch, every image once an epoch, the same plan on every rank."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from sentences import refused

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import sizes as sizes_module
from ldm_vae.data import stamps
from ldm_vae.data.buckets import Assignment, BucketConfig, assign, batches, generate
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.sampler import Work
from ldm_vae.data.sizes import read_sizes, shared_sizes
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import TransformConfig


def test_generated_shapes() -> None:
    shapes = generate(1024 * 1024, step=64)
    assert (1024, 1024) in shapes and (832, 1216) in shapes and (1216, 832) in shapes  # SDXL's own
    assert len(set(shapes)) == len(shapes) and shapes == sorted(shapes, key=lambda shape: shape[0] / shape[1])
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert 0.85 * 1024**2 < height * width <= 1024**2
        assert max(height, width) <= 2 * min(height, width)
        assert (width, height) in shapes
    assert generate(64 * 64, step=64) == [(64, 64)]
    with refused(UsageError, "area"):
        generate(32, step=64)


def test_assignment_is_by_the_logarithm_of_the_aspect() -> None:
    shapes = [(32, 64), (64, 64), (64, 32)]
    sizes = np.array([[100, 210], [100, 139], [100, 143], [139, 100], [143, 100], [0, 0], [5, 5]])
    assignment = assign(shapes, sizes)
    assert assignment.bucket.tolist() == [0, 1, 0, 1, 2, -1, 1]  # sqrt(2) is the border on both sides
    assert assignment.counts() == [2, 3, 1]
    with refused(UsageError, "buckets"):
        assign([], sizes)


def assignment_of(counts: list[int]) -> Assignment:
    bucket = np.concatenate([np.full(count, number, dtype=np.int16) for number, count in enumerate(counts)])
    return Assignment(
        tuple((8, 8 + number) for number in range(len(counts))), np.random.default_rng(0).permutation(bucket)
    )


def plan(counts: list[int], batch_size: int, world_size: int, steps: int, start: int = 0) -> list[list[Work]]:
    """[rank][step]."""
    return [
        list(
            islice(
                batches(
                    assignment_of(counts),
                    3,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    start_position=start,
                ),
                steps,
            )
        )
        for rank in range(world_size)
    ]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
)
def test_every_image_once_an_epoch_of_its_bucket(counts: list[int], batch_size: int, world_size: int) -> None:
    whole = batch_size * world_size
    steps = 3 * (sum(counts) // whole + len(counts))
    ranks = plan(counts, batch_size, world_size, steps)
    assignment = assignment_of(counts)
    met: dict[int, list[tuple[int, int]]] = {}
    for step in range(steps):
        together = [rank[step] for rank in ranks]
        assert len({work.shape for work in together}) == 1
        number = assignment.shapes.index(together[0].shape)
        tasks = [task for work in together for task in work.tasks]
        assert [task.position for task in tasks] == list(range(step * whole, (step + 1) * whole))
        assert all(assignment.bucket[task.index] == number for task in tasks)
        met.setdefault(number, []).extend((task.epoch, task.index) for task in tasks)
    for number, seen in met.items():
        per_epoch = Counter(epoch for epoch, _ in seen)
        last = max(per_epoch)
        assert len(set(seen)) == len(seen)  # nothing twice in an epoch
        finished = [epoch for epoch, count in per_epoch.items() if count == counts[number]]
        assert len(finished) >= last - 1  # at the seam an epoch may still be open in batches that come later


def test_the_plan_is_the_same_for_any_ranks_and_resume() -> None:
    counts = [11, 3, 20]
    one = plan(counts, 6, 1, 12)[0]
    three = plan(counts, 2, 3, 12)
    for step in range(12):
        assert one[step].tasks == [task for rank in three for task in rank[step].tasks]
        assert one[step].shape == three[0][step].shape
    resumed = plan(counts, 6, 1, 7, start=30)[0]
    assert resumed == one[5:]
    assert plan(counts, 6, 1, 6, start=31)[0] == one[6:]  # the next whole batch
    assert {work.shape for work in one} == {(8, 8), (8, 9), (8, 10)}
    shapes = [work.shape for work in plan(counts, 2, 1, 40)[0]]
    assert shapes != sorted(shapes)


def test_training_in_buckets(tmp_path: Path) -> None:
    for number, (height, width) in enumerate([(30, 60), (32, 61), (40, 40), (41, 40), (90, 40), (40, 42)]):
        pixels = np.full((height, width, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "6.png").write_bytes(b"junk")
    source = open_source(tmp_path)
    sizes, bad = read_sizes(source, range(7), num_workers=1)
    assert sizes[0].tolist() == [30, 60] and sizes[6].tolist() == [0, 0]
    assert [(entry.key, entry.reason) for entry in bad] == [
        ("6.png", "not an image of a known format, or damaged at its beginning")
    ]
    assignment = assign(generate(32 * 32, step=8), sizes)
    loader = training_loader(source, TransformConfig(), 32, seed=0, batch_size=2, buckets=assignment, num_workers=1)
    seen = Counter()
    for batch in islice(loader, 12):
        height, width = batch.pixels.shape[2:]
        for index, (_, _, rows, columns) in zip(batch.indices.tolist(), batch.boxes.tolist(), strict=True):
            assert assignment.shapes[assignment.bucket[index]] == (height, width)
            assert abs(rows / columns - height / width) < 0.06
            seen[index] += 1
    assert set(seen) == set(range(6))
    with refused(WorkError, "size"):
        next(batches(Assignment(((8, 8),), np.full(3, -1, np.int16)), 0, batch_size=1))


def test_every_rank_reads_its_part_and_a_resumed_run_reads_nothing(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(image_folder)
    path, count = tmp_path / "sizes.safetensors", len(source)
    parts: list[torch.Tensor] = []

    def alone(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return part

    for rank in (0, 1):
        shared_sizes(source, tmp_path / f"of_{rank}", rank=rank, world_size=2, add_up=alone)
    assert [[bool(row.any()) for row in part].count(True) for part in parts] == [6, 6]
    assert (parts[0] + parts[1])[:, :2].tolist() == [[40, 48]] * count
    one = {"rank": 0, "world_size": 1, "add_up": lambda part: part}
    sizes, _ = shared_sizes(source, path, **one)
    for file in image_folder.iterdir():
        file.write_bytes(b"")
    again, bad = shared_sizes(source, path, **one)
    assert again.tolist() == sizes.tolist() == [[40, 48]] * count and bad == []
    path.write_bytes(b"torn")
    assert len(shared_sizes(source, path, **one)[1]) == count


def test_sizes_that_were_kept_are_those_of_the_images_that_are_there(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another picture under a name, and as many images under other names."""
    monkeypatch.setattr(stamps, "SETTLED", 0)
    path = tmp_path / "sizes.safetensors"
    one: dict[str, Any] = {"rank": 0, "world_size": 1, "add_up": lambda part: part}
    shared_sizes(open_source(image_folder), path, **one)
    were = (image_folder / "img_0003.png").stat()
    Image.new("RGB", (16, 24)).save(image_folder / "img_0003.png")
    os.utime(image_folder / "img_0003.png", ns=(were.st_atime_ns, were.st_mtime_ns))
    read: list[int] = []

    def noted(source: Any, indices: Any, *more: Any) -> Any:
        read.extend(indices)
        return read_sizes(source, indices)

    monkeypatch.setattr(sizes_module, "read_sizes", noted)
    now, _ = shared_sizes(open_source(image_folder), path, **one)
    assert now[3].tolist() == [24, 16] and now[4].tolist() == [40, 48] and read == [3]
    (image_folder / "img_0003.png").rename(image_folder / "z.png")
    now, _ = shared_sizes(open_source(image_folder), path, **one)
    assert now[-1].tolist() == [24, 16] and now[3].tolist() == [40, 48]
    read.clear()
    assert shared_sizes(open_source(image_folder), path, **one)[0].tolist() == now.tolist() and read == []


def test_the_config() -> None:
    assert BucketConfig(step=64).choose(1024, 8) == generate(1024 * 1024, 64)
    assert BucketConfig(area=64 * 64, step=32, max_aspect=1).choose(1024, 8) == [(64, 64)]
    assert BucketConfig(shapes=[(64, 32), (32, 64), (32, 64)]).choose(256, 8) == [(32, 64), (64, 32)]
    with refused(UsageError, "f") as error:
        BucketConfig(step=8).choose(32, 16)
    assert "24 x" in str(error.value)
    for wrong, says in (
        ({"shapes": []}, "at least one"),
        ({"shapes": [(0, 8)]}, "above 0"),
        ({"shapes": [(8, 8)], "step": 32}, "step: has no effect beside shapes"),
    ):
        with pytest.raises(ValidationError, match=says):
            BucketConfig(**wrong)
