"""Sources of clips: every kind, windows that cover videos, training crops in time, buckets, survey and records."""

from __future__ import annotations

import argparse
import io
import json
import logging
import tarfile
import zipfile
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sentences import refused
from videos import frame, number_of, write_video

from ldm_vae.autoencoder.preparation import plain
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import buckets, footage
from ldm_vae.data.clips import frames_of
from ldm_vae.data.dataset import ordered_loader, training_loader
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.inventory import compare, take_inventory
from ldm_vae.data.preprocessing import Preprocessing, parse
from ldm_vae.data.quarantine import Quarantine, read_quarantine
from ldm_vae.data.sizes import read_sizes, shared_sizes
from ldm_vae.data.source import open_source
from ldm_vae.data.survey import lines, survey, thumbnails
from ldm_vae.data.transforms import PREPROCESSING_VERSION, TransformConfig, decoding_of, preprocessing_identity
from ldm_vae.data.windows import windows
from ldm_vae.metrics.batches import image_batches
from ldm_vae.training.config import Training
from ldm_vae.training.data import ImageFeed, open_sources

PLAIN = TransformConfig(crop="centre", flip=False)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Two videos of 17 and 11 frames, one of 3, one that is damaged, and two images."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_video(folder / "a.mkv", 17)
    write_video(folder / "b.mp4", 11, codec="libx264", sound=True)
    write_video(folder / "c.mkv", 3)
    (folder / "d.mp4").write_bytes(b"nothing of a video")
    for number in (1, 2):
        Image.fromarray(frame(number)).save(folder / f"e{number}.png")
    return folder


def shown(pixels: torch.Tensor) -> list[int]:
    """The numbers of the frames in a clip [C, T, H, W]."""
    return [number_of(pixels[:, at]) for at in range(pixels.shape[1])]


def walked(source: Any, **options: Any) -> dict[str, Any]:
    """key => numbers of its frames, or why it is none."""
    found: dict[str, Any] = {}
    for samples, bad in ordered_loader(source, 16, batch_size=3, **options):
        found |= {sample.key: shown(sample.crop.pixels) for sample in samples} | {one.key: one.reason for one in bad}
    return found


EXPECTED = {
    "a.mkv": [0, 1, 2, 3, 4],
    "a.mkv#t=0.2": [5, 6, 7, 8, 9],
    "a.mkv#t=0.4": [10, 11, 12, 13, 14],
    "b.mp4": [0, 1, 2, 3, 4],
    "b.mp4#t=0.2": [5, 6, 7, 8, 9],
    "c.mkv": "3 frames in 0.12 s: 3 of the 5 of a clip",
    "d.mp4": "not a video that can be read: Invalid data found when processing input",
    "e1.png": [1],
    "e2.png": [2],
}


def test_windows_cover_videos_and_say_what_is_left(films: Path, caplog: pytest.LogCaptureFixture) -> None:
    footage._SAID.clear()
    source = windows(open_source(films, frames=5))
    named = walked(source)
    # of several clips the first has its time too
    assert named == {key if "#" in key or key[0] not in "ab" else f"{key}#t=0": EXPECTED[key] for key in EXPECTED}
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "1 of the videos: audio, ignored",
        "3 of 28 frames are left out: the last of a video, which fill no clip of 5",
    ]
    assert [source.key(index) for index in range(len(source))] == sorted(named)
    assert walked(source, num_workers=2) == named and repr(source) == f"Windows({str(films)!r}: {len(source)} clips)"
    assert windows(pictures := open_source(films)) is pictures and len(pictures) == 2


def test_every_kind_of_source_reads_clips(films: Path, tmp_path: Path) -> None:
    names = ("a.mkv", "b.mp4", "e1.png")
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        for name in names:
            archive.write(films / name, name)
    with tarfile.open(tmp_path / "films.tar", "w") as tar:
        for name in names:
            tar.add(films / name, name)
            text = tarfile.TarInfo(f"{name.split('.')[0]}.txt")
            text.size = 4
            tar.addfile(text, io.BytesIO(b"word"))
    (tmp_path / "films.txt").write_text("".join(f"films/{name}\n" for name in names))
    expected = [EXPECTED[name] for name in ("a.mkv", "b.mp4", "e1.png")]
    for kind in ("zip", "tar", "txt"):
        source = open_source(
            tmp_path / f"films.{kind}", frames=5, **({"caption_column": "txt"} if kind == "tar" else {})
        )
        assert list(walked(source).values()) == expected
        assert kind != "tar" or source[0].columns == {"caption": "word"}
        assert len(windows(source)) == 6


def test_videos_in_a_table_and_in_a_stream(films: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"bytes": (films / "a.mkv").read_bytes(), "path": None}, {"bytes": None, "path": str(films / "b.mp4")}]
    table = datasets.Dataset.from_dict({"video": rows, "text": ["x", "y"]})
    table.to_parquet(str(tmp_path / "films.parquet"))
    source = open_source(tmp_path / "films.parquet", frames=5)
    assert list(walked(source).values()) == [EXPECTED["a.mkv"], EXPECTED["b.mp4"]]
    # as a hub has them: a column of the feature Video, found by its kind, and never decoded by `datasets`
    features = datasets.Features({"film": datasets.Video(), "text": datasets.Value("string")})
    there = datasets.Dataset.from_dict({"film": rows, "text": ["x", "y"]}, features=features)
    there.save_to_disk(str(tmp_path / "saved"))
    there.to_parquet(str(tmp_path / "hub.parquet"))
    for name in ("saved", "hub.parquet"):
        source = open_source(tmp_path / name, frames=5, caption_column="text")
        assert list(walked(source).values()) == [EXPECTED["a.mkv"], EXPECTED["b.mp4"]], name
        assert source[1].columns["caption"] == "y" and len(windows(source)) == 5
    with tarfile.open(tmp_path / "films.tar.gz", "w:gz") as tar:
        for name in ("a.mkv", "b.mp4"):
            tar.add(films / name, name)
    stream = open_source(tmp_path / "films.tar.gz", kind="webdataset", frames=5)
    batch = next(training_loader(stream, PLAIN, 16, seed=0, batch_size=2))
    assert batch.pixels.shape == (2, 3, 5, 16, 16)


def test_folders_of_frames(tmp_path: Path) -> None:
    for clip, count in (("walk/one", 12), ("walk/two", 4), ("run/three", 10)):
        (tmp_path / "clips" / clip).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(frame(number)).save(tmp_path / "clips" / clip / f"f{number + 1}.png")
    source = open_source(tmp_path / "clips", kind="frames", frames=5)
    assert walked(windows(source)) == {
        "run/three#frame=0": [0, 1, 2, 3, 4],
        "run/three#frame=5": [5, 6, 7, 8, 9],
        "walk/one#frame=0": [0, 1, 2, 3, 4],
        "walk/one#frame=5": [5, 6, 7, 8, 9],
        "walk/two": "4 frames in 4.00 s: 4 of the 5 of a clip",
    }
    assert source[0].columns == {"label": 0, "label_name": "run"}
    assert walked(open_source(tmp_path / "clips", kind="frames", frames=3, frame_stride=4))["walk/one"] == [0, 4, 8]
    (tmp_path / "clips" / "walk" / "one" / "f7.png").unlink()
    assert "frame 7 is missing" in walked(source.__class__(source.root, source.decoding))["walk/one"]
    assert repr(source) == f"FrameFolders({str(tmp_path / 'clips')!r}: {len(source)} folders of frames)"
    for knobs, field in (({}, "data.frames"), ({"frames": 5, "frame_rate": 8.0}, "data.frame_rate")):
        with refused(UsageError, field):
            open_source(tmp_path / "clips", kind="frames", **knobs)


def test_a_folder_of_videos_without_frames_says_what_reads_them(films: Path) -> None:
    for image in films.glob("*.png"):
        image.unlink()
    with refused(WorkError, "frames"):
        open_source(films)


def taken(source: Any, count: int, **options: Any) -> dict[int, tuple[str, bytes]]:
    """position => key and pixels of a training stream."""
    batch_size = options.pop("batch_size", 2)
    loader = training_loader(source, TransformConfig(scale=(1.0, 2.0)), 16, seed=3, batch_size=batch_size, **options)
    return {
        position: (key, pixels.numpy().tobytes())
        for batch in islice(loader, count // batch_size)
        for position, key, pixels in zip(batch.positions.tolist(), batch.keys, batch.pixels, strict=True)
    }


def test_training_draws_time_and_place_by_seed_epoch_and_index(films: Path) -> None:
    for name in ("c.mkv", "d.mp4", "e1.png", "e2.png"):
        (films / name).unlink()
    source = open_source(films, frames=5)
    expected = taken(source, 24)
    assert taken(source, 24, batch_size=4, num_workers=2) == expected
    assert taken(source, 8, start_position=16) == {at: expected[at] for at in range(16, 24)}
    assert len(set(expected.values())) > 12
    starts = set()
    for batch in islice(training_loader(source, PLAIN, 16, seed=3, batch_size=2), 30):
        for key, pixels in zip(batch.keys, batch.pixels, strict=True):
            numbers = shown(pixels)
            assert numbers == list(range(numbers[0], numbers[0] + 5))
            starts.add((key, numbers[0]))
    assert {start for key, start in starts if key == "b.mp4"} == set(range(7))
    assert max(start for key, start in starts if key == "a.mkv") > 8


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "still.mkv", 9, pictures=[picture] * 9)
    flipped = set()
    loader = training_loader(open_source(tmp_path, frames=5), TransformConfig(scale=(1, 2)), 16, seed=0, batch_size=2)
    for batch in islice(loader, 6):
        assert all(torch.equal(batch.pixels[:, :, 0], batch.pixels[:, :, at]) for at in range(1, 5))
        flipped |= set(batch.flipped.tolist())
    assert flipped == {True, False}


def test_images_mix_with_videos_in_buckets_of_their_own(films: Path, tmp_path: Path) -> None:
    source = open_source(films, frames=5)
    sizes, bad = read_sizes(source, range(len(source)))
    assert sizes.tolist() == [[17, 32, 48], [11, 32, 48], [3, 32, 48], [0, 0, 0], [1, 32, 48], [1, 32, 48]]
    assert [one.key for one in bad] == ["d.mp4"]
    shapes = buckets.of_clips([(16, 16), (16, 24)], 5)
    assert shapes == [(1, 16, 16), (5, 16, 16), (1, 16, 24), (5, 16, 24)]
    chosen = buckets.assign(shapes, sizes)
    assert chosen.bucket.tolist() == [3, 3, -1, -1, 2, 2]
    assert chosen.lines() == ["  1 x 16 x 24          2", "  5 x 16 x 24          2"]
    lengths = buckets.assign([(1, 16, 16), (5, 16, 16), (9, 16, 16), (17, 16, 16)], sizes).bucket.tolist()
    assert lengths == [3, 2, -1, -1, 0, 0]
    options = {"buckets": chosen, "seed": 1}
    batches = list(islice(training_loader(source, PLAIN, 16, batch_size=2, **options), 12))
    kinds = {(tuple(batch.pixels.shape), *sorted(set(batch.keys))) for batch in batches}
    assert kinds == {((2, 3, 5, 16, 24), "a.mkv", "b.mp4"), ((2, 3, 1, 16, 24), "e1.png", "e2.png")}
    assert not any(batch.bad for batch in batches)
    again = list(islice(training_loader(source, PLAIN, 16, batch_size=2, num_workers=2, **options), 12))
    assert all(torch.equal(one.pixels, two.pixels) for one, two in zip(batches, again, strict=True))
    with refused(UsageError, "data.frames"):
        list(islice(training_loader(source, PLAIN, 16, seed=1, batch_size=6), 1))
    kept = {"rank": 0, "world_size": 1, "add_up": lambda part: part}
    first = shared_sizes(source, tmp_path / "sizes", **kept)[0]
    assert (shared_sizes(source, tmp_path / "sizes", **kept)[0] == first).all() and first.tolist() == sizes.tolist()


def test_a_survey_tells_of_clips(films: Path, tmp_path: Path) -> None:
    source = plain(DataFlags(frames=5)).open(films, whole=True)
    found = survey(source)
    told = "\n".join(lines(found, 16, [(16, 16), (16, 24)]))
    for line in (
        "6 images and videos: 4 usable, 2 not", "images      2 of them, clips of one frame", "frames/s    25 2",
        "notes       1: audio, ignored",
    ):  # fmt: skip
        assert line in told
    assert "frames              11        11        14        17        17" in told.replace("seconds", "\nseconds")
    assert thumbnails(source, found, tmp_path / "t.png") == 4
    assert found.good[0].bytes == (films / "a.mkv").stat().st_size


def test_inventory_sees_a_changed_video(films: Path) -> None:
    source = open_source(films, frames=5)
    before = take_inventory(source)
    assert not compare(before, source)[0]
    write_video(films / "a.mkv", 16)
    assert str(compare(before, source)[0]) == "1 have changed (the first: a.mkv)"


def test_the_record_and_the_identity_hold_what_a_clip_is() -> None:
    decoding = Decoding(frames=17, frame_rate=8.0, frame_stride=2)
    record = Preprocessing.of(decoding)
    assert record.signal == "video" and parse(record.to_bytes(), "here").decoding == decoding
    assert preprocessing_identity(decoding) == f"{PREPROCESSING_VERSION} frames=17 frame_rate=8.0 frame_stride=2"
    assert decoding_of(preprocessing_identity(decoding)) == decoding
    assert not {"frames", "frame_rate", "frame_stride"} & set(json.loads(Preprocessing.of(Decoding()).to_bytes()))
    for changes in ({"signal": "image"}, {"frames": None}):
        with refused(UsageError, "frames"):
            parse(json.dumps(json.loads(record.to_bytes()) | changes), "here")
    assert plain(DataFlags(frames=5, frame_rate=8.0)).decoding == Decoding(frames=5, frame_rate=8.0)


def test_without_pyav_a_sentence_names_the_extra(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with refused(UsageError, "PyAV"):
        list(frames_of(open_source(films, frames=4)[0].image, Decoding(frames=4)))


def test_a_window_is_exact_at_rates_that_are_no_decimals(tmp_path: Path) -> None:
    write_video(tmp_path / "n.mp4", 17, codec="libx264", rate=Fraction(30000, 1001))
    source = windows(open_source(tmp_path, frames=4))
    assert list(walked(source).values()) == [[first + at for at in range(4)] for first in (0, 4, 8, 12)]
    assert source.key(1) == "n.mp4#t=0.133467"


def test_a_note_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    footage._SAID.clear()
    with caplog.at_level(logging.WARNING):
        footage.tell("x", {"audio, ignored": 2})
        footage.tell("x", {"audio, ignored": 1})
    assert [record.message for record in caplog.records] == ["data x: 2 of the videos: audio, ignored"]


def test_evaluation_reads_clips_and_images_in_batches_of_one_shape(films: Path) -> None:
    source = windows(open_source(films, frames=5))
    batches = list(image_batches(source, None, 16, batch_size=9))
    assert [tuple(batch.pixels.shape) for batch in batches] == [(5, 3, 5, 16, 16), (2, 3, 1, 16, 16)]
    assert [key for batch in batches for key in batch.keys][-3:] == ["b.mp4#t=0.2", "e1.png", "e2.png"]


def test_a_run_feeds_videos_and_images_and_quarantines_the_rest(films: Path, tmp_path: Path) -> None:
    data = {"kind": "folder", "path": str(films), "frames": 5}
    (tmp_path / "run").mkdir()
    settings = Training.model_validate(
        {
            "output_dir": str(tmp_path / "run"), "data": data, "validation_data": data, "resolution": 16,
            "train_batch_size": 2, "losses": {"l1": {}}, "max_train_images": 4,
        }
    )  # fmt: skip
    source, held_out = open_sources(settings, Accelerator(cpu=True))
    assert held_out is not None and len(held_out) == 9
    quarantine = Quarantine(len(source), path=tmp_path / "run" / "quarantine.jsonl")
    feed = ImageFeed(settings, None, source)
    assert feed.prepared.signal == "video"
    batches = list(islice(feed.batches(Accelerator(cpu=True), 0, quarantine), 8))
    assert {batch.pixels.shape[2] for batch in batches} == {1, 5}
    assert {bad.key: bad.reason for bad in read_quarantine(tmp_path / "run" / "quarantine.jsonl")} == {
        "c.mkv": "3 frames fill no bucket",
        "d.mp4": EXPECTED["d.mp4"],
    }


def test_what_has_another_length_stands_in_for_no_clip_and_is_not_bad(films: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    (films / "d.mp4").unlink()
    start = {"movflags": "faststart"}
    path = write_video(films / "b.mp4", 40, codec="libx264", options={"g": "10"}, container=start, pictures=noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    source = open_source(films, frames=5)
    chosen = buckets.assign([(1, 16, 16), (5, 16, 16)], read_sizes(source, range(len(source)))[0])
    batches = list(islice(training_loader(source, PLAIN, 16, seed=1, batch_size=2, buckets=chosen), 16))
    bad = {one.key: one.reason for batch in batches for one in batch.bad}
    assert bad.keys() == {"b.mp4"} and "damaged" in bad["b.mp4"]
    assert {key for batch in batches if batch.pixels.shape[2] == 5 for key in batch.keys} == {"a.mkv", "b.mp4"}


def test_a_field_that_has_a_flag_is_refused_by_its_name() -> None:
    with refused(UsageError, "--data.frames"):
        DataFlags.of(argparse.Namespace(data_fields={"frames": "5"}))
    for name, value in (("frames", 0), ("frame_rate", -1.0), ("frame_stride", 0)):
        with refused(UsageError, f"--{name}"):
            DataFlags.of(argparse.Namespace(**{name: value}))
