"""The training program on aspect buckets, on what can only be read in order, and with jpeg_draft."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from images import write_images
from PIL import Image
from training_runs import metrics, newest, one_sentence, run, run_two, write_config

SHORT = {"max_train_images": 32, "log_every_images": 4, "checkpoint_every_images": 16, "train_batch_size": 4}
SHAPES = [(24, 48), (30, 60), (40, 40), (41, 40), (42, 42), (90, 40), (64, 32)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three aspect ratios, and one that is none."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(0)
    for number, (height, width) in enumerate(SHAPES):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(folder / f"{number}.png")
    (folder / "junk.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows.parquet of eleven rows, one of them without an image; whole.parquet of ten that all have one."""
    folder = tmp_path_factory.mktemp("parquet")
    files = sorted(map(str, write_images(folder / "images", 10).glob("*.png")))
    rows = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    features = datasets.Features({"image": datasets.Image()})
    for name, images in (("whole", rows), ("rows", [*rows[:3], {"bytes": b"junk", "path": None}, *rows[3:]])):
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / f"{name}.parquet")
    return folder / "rows.parquet"


BUCKETS = {"buckets": {"step": 8, "max_aspect": 2.0}}


@pytest.fixture(scope="module")
def in_buckets(tmp_path_factory: pytest.TempPathFactory, mixed: Path) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    done = run(write_config(folder, mixed, **SHORT, **BUCKETS))
    assert done.returncode == 0, done.stderr
    assert "aspect buckets (height x width) of 7 of 8 images:" in done.stdout
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    told = {f"{height} x {width}": int(count) for height, _, width, count in said}
    assert told == {"24 x 40": 2, "32 x 32": 3, "40 x 24": 2}
    assert "1 of 8 images could not be used" in done.stdout
    entries = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in entries] == ["junk.png"]
    return folder / "run"


def assert_same_course(one: Path, two: Path) -> None:
    """One process and two saw the same images: their losses are equal to what rounding makes of eight steps of Adam."""
    ours, theirs = metrics(one), metrics(two)
    assert (ours[0]["num_processes"], theirs[0]["num_processes"]) == (1, 2)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["images"] == other["images"]
        for name in ("loss/l1", "loss/kl"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), (mine["images"], name)


def assert_equal_bits(one: Path, two: Path) -> None:
    assert metrics(one) == metrics(two)
    for file in ("tensors.safetensors", "state.json"):
        assert (newest(one) / file).read_bytes() == (newest(two) / file).read_bytes(), file


@pytest.mark.slow
def test_a_run_in_buckets_resumes_to_the_bit(in_buckets: Path, mixed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, mixed, **SHORT | {"max_train_images": 16}, **BUCKETS)
    assert run(config).returncode == 0
    config.write_text(config.read_text().replace("max_train_images: 16", "max_train_images: 32"))
    resumed = run(config, "--dataloader_num_workers", "2")
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stderr
    assert_equal_bits(in_buckets, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_in_the_same_buckets(in_buckets: Path, mixed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, mixed, **SHORT | {"train_batch_size": 2}, **BUCKETS)
    run_two(config)
    assert_same_course(in_buckets, tmp_path / "run")


def stream_config(folder: Path, parquet: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = {"kind": "hub", "path": str(parquet), "streaming": True, "shuffle_buffer": 5}
    return write_config(folder, parquet, **SHORT | {"data": data} | changes)


@pytest.mark.slow
def test_a_stream_trains_end_to_end_and_resumes_to_the_bit(parquet: Path, tmp_path: Path) -> None:
    whole = run(stream_config(tmp_path / "whole", parquet))
    assert whole.returncode == 0, whole.stderr
    assert "read in order: its length is unknown" in whole.stdout
    assert "1 of the images could not be used" in whole.stdout
    assert (tmp_path / "whole" / "run" / "vae" / "config.json").is_file()
    config = stream_config(tmp_path / "parts", parquet, max_train_images=16)
    assert run(config).returncode == 0
    resumed = run(config, "--max_train_images", "32")
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stderr
    assert_equal_bits(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


@pytest.mark.slow
def test_two_processes_share_a_stream(parquet: Path, tmp_path: Path) -> None:
    # with a broken image it is not so: what takes its place is a neighbour in the batch of its own process
    whole = parquet.with_name("whole.parquet")
    assert run(stream_config(tmp_path / "one", whole)).returncode == 0
    config = stream_config(tmp_path / "two", whole, train_batch_size=2)
    run_two(config)
    assert_same_course(tmp_path / "one" / "run", tmp_path / "two" / "run")


def test_what_a_stream_cannot_do_is_said_before_work_starts(mixed: Path, parquet: Path, tmp_path: Path) -> None:
    said = one_sentence(run(stream_config(tmp_path, parquet, **BUCKETS)), 2)
    assert "buckets: need the size of every image beforehand" in said
    streamed = {"kind": "hub", "path": str(parquet), "streaming": True}
    said = one_sentence(run(write_config(tmp_path, mixed, validation_data=streamed)), 2)
    assert "validation_data: can only be read in order" in said
    said = one_sentence(run(write_config(tmp_path, mixed, buckets={"shapes": [[33, 32]]})), 2)
    assert "buckets: sides must be multiples of f = 2, got 33 x 32" in said
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_jpeg_draft_trains_and_is_refused_for_what_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for path in write_images(tmp_path / "png", 4, (150, 150)).glob("*.png"):
        Image.open(path).save(folder / f"{path.stem}.jpg", quality=95)
    draft = {"kind": "folder", "path": str(folder), "jpeg_draft": True}
    said = one_sentence(run(write_config(tmp_path, folder, data=draft, validation_data=draft)), 2)
    assert "validation_data.jpeg_draft: for training only" in said and not (tmp_path / "run").exists()
    done = run(write_config(tmp_path, folder, **SHORT | {"data": draft, "max_train_images": 4}))
    assert done.returncode == 0, done.stderr  # its normalisation is measured on exact pixels
