"""Loaders: determinism over workers, ranks and resumes; bad images; ordered passes."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from fork_server import fork
from sentences import refused

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.dataset import Batch, ordered_loader, training_loader
from ldm_vae.data.decoding import decode
from ldm_vae.data.source import Source, open_source
from ldm_vae.data.transforms import TransformConfig, centre_crop
from ldm_vae.data.workers import load

CONFIG = TransformConfig(scale=(1.0, 2.0))


def stream(source: Source, images: int, batch_size: int, world_size: int = 1, start: int = 0, **more: object):
    """position => (key, pixels), put together from every rank."""
    steps = images // (batch_size * world_size)
    assert steps * batch_size * world_size == images
    together: dict[int, tuple[str, bytes]] = {}
    for rank in range(world_size):
        loader = training_loader(
            source,
            CONFIG,
            16,
            seed=5,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_position=start,
            **more,
        )
        for batch in islice(loader, steps):
            assert batch.pixels.shape == (batch_size, 3, 16, 16) and batch.pixels.dtype == torch.uint8
            for position, key, pixels in zip(batch.positions.tolist(), batch.keys, batch.pixels, strict=True):
                assert position not in together
                together[position] = (key, pixels.numpy().tobytes())
    assert sorted(together) == list(range(start, start + images))
    return together


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_stream_is_the_same_whatever_reads_it(image_folder: Path, context: str) -> None:
    source = open_source(image_folder)
    expected = stream(source, 24, batch_size=24)
    assert len({key for key, _ in expected.values()}) == 12
    workers = 2 if context == "fork" else 1  # a spawned one imports torch, alone
    assert stream(source, 24, 4, num_workers=workers, multiprocessing_context=context) == expected
    if context == "fork":
        assert stream(source, 24, 2, world_size=3) == expected
        assert stream(source, 24, 2, world_size=2, num_workers=1) == expected
        resumed = stream(source, 8, 8) | stream(source, 16, 2, world_size=4, start=8, num_workers=2)
        assert resumed == expected


def test_epochs_differ_and_the_global_generator_is_left_alone(image_folder: Path) -> None:
    state = torch.random.get_rng_state()
    both = stream(open_source(image_folder), 24, 12, num_workers=1)
    first, second = dict(list(both.values())[:12]), dict(list(both.values())[12:])
    assert first.keys() == second.keys()
    assert sum(first[key] != second[key] for key in first) >= 11
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_a_batch_says(image_folder: Path) -> None:
    source = open_source(image_folder)
    batch: Batch = next(training_loader(source, CONFIG, 16, seed=0, batch_size=5, start_position=10))
    assert batch.positions.tolist() == [10, 11, 12, 13, 14]
    assert batch.epochs.tolist() == [0, 0, 1, 1, 1]
    assert batch.keys == [source.key(index) for index in batch.indices.tolist()]
    assert batch.original_sizes.tolist() == [[40, 48]] * 5
    for (top, left, height, width), flipped in zip(batch.boxes.tolist(), batch.flipped.tolist(), strict=True):
        assert 0 <= top <= 40 - height and 0 <= left <= 48 - width and 20 <= height == width <= 40
        assert isinstance(flipped, bool)
    assert batch.bad == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_and_reported(image_folder: Path, num_workers: int) -> None:
    (image_folder / "img_0004.png").write_bytes(b"")
    (image_folder / "img_0005.png").write_bytes(b"not a picture")
    source = open_source(image_folder)
    loader = training_loader(source, CONFIG, 16, seed=0, batch_size=6, num_workers=num_workers)
    epoch = list(islice(loader, 2))
    assert sorted(key for batch in epoch for key in batch.keys) == sorted(
        source.key(index if index not in (4, 5) else 6) for index in range(12)
    )
    reasons = {bad.key: bad.reason for batch in epoch for bad in batch.bad}
    assert reasons["img_0004.png"] == "the file is empty"
    assert "not an image" in reasons["img_0005.png"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_usable_ends_in_a_sentence(tmp_path: Path, num_workers: int) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    loader = training_loader(open_source(tmp_path), CONFIG, 16, seed=0, batch_size=2, num_workers=num_workers)
    with refused(WorkError, "image") as error:
        next(loader)
    assert "among 3" in str(error.value)


def test_vanished_during_the_run(image_folder: Path) -> None:
    source = open_source(image_folder)
    loader = training_loader(source, CONFIG, 16, seed=0, batch_size=12)
    assert next(loader).bad == []
    (image_folder / "img_0007.png").unlink()
    assert [(bad.key, bad.reason) for bad in next(loader).bad] == [
        ("img_0007.png", "no such file (it vanished, or never was)")
    ]


# --- in order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_ordered_pass_meets_every_image_once(image_folder: Path, num_workers: int) -> None:
    (image_folder / "img_0004.png").write_bytes(b"")
    (image_folder / "img_0011.png").write_bytes(b"")
    source = open_source(image_folder)
    seen = list(ordered_loader(source, 16, batch_size=5, num_workers=num_workers))
    assert [len(good) + len(bad) for good, bad in seen] == [5, 5, 2]
    good = [sample for samples, _ in seen for sample in samples]
    assert [sample.index for sample in good] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert [bad.key for _, bads in seen for bad in bads] == ["img_0004.png", "img_0011.png"]
    for sample in good:
        data = (image_folder / sample.key).read_bytes()
        assert torch.equal(sample.crop.pixels, centre_crop(decode(data), 16).pixels)
        assert len(sample.checksum) == 64


def test_chosen_indices_and_views(image_folder: Path) -> None:
    def two(image: torch.Tensor, size: tuple[int, int]):
        return centre_crop(image, 16, size), centre_crop(image, (8, 24), size)

    source = open_source(image_folder)
    ((good, bad),) = ordered_loader(source, 16, [7, 2], batch_size=4, view=two)
    assert [sample.key for sample in good] == ["img_0007.png", "img_0002.png"] and bad == []
    assert [tuple(crop.pixels.shape) for crop in good[0].views] == [(3, 16, 16), (3, 8, 24)]
    assert torch.equal(good[1].views[1].pixels, two(decode(source[2].image), (40, 48))[1].pixels)
    assert list(ordered_loader(source, 16, [], batch_size=4)) == []


def test_evaluation_refuses_jpeg_draft(image_folder: Path) -> None:
    source = open_source(image_folder, jpeg_draft=True)
    with refused(UsageError, "data.jpeg_draft"):
        ordered_loader(source, 16, batch_size=4)
    assert len(list(ordered_loader(source, 16, batch_size=12, draft_at_least=16))) == 1


class Endless:
    """A data set whose first batch never comes: a read that hangs."""

    def __init__(self, pids: Path) -> None:
        self.pids = pids

    def __getitems__(self, tasks: object) -> object:
        (self.pids / str(os.getpid())).touch()
        time.sleep(600)
        return tasks


def hang() -> None:
    next(load(Endless(Path(sys.argv[1])), [[0], [1]], num_workers=2))


def test_workers_inside_a_batch_leave_with_a_killed_main_process(tmp_path: Path) -> None:
    victim = fork(hang, [str(tmp_path)])
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert victim.running()
        time.sleep(0.01)
    victim.kill(signal.SIGKILL)
    victim.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "they hold the lock of the run"
        time.sleep(0.05)
