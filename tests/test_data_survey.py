"""`ldm-vae inspect`: what it says about a folder, damaged files, streams; the thumbnails."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from images import write_images
from PIL import Image

from ldm_vae import cli
from ldm_vae.data import buckets
from ldm_vae.data.source import open_source
from ldm_vae.data.survey import lines, survey


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, (size, name) in enumerate([((40, 40), "a.png"), ((80, 40), "b.jpg"), ((40, 80), "c.png")]):
        Image.new("RGB", size, (80 * number, 0, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture {number}" if number else "")
    Image.new("L", (20, 20)).save(folder / "d.png")
    (folder / "e.png").write_bytes(b"")
    (folder / "f.png").write_bytes(b"junk")
    return folder


def test_what_it_says(mixed: Path) -> None:
    source = open_source(mixed, caption_column="txt")
    found = survey(source)
    assert (found.total, len(found.good), len(found.bad)) == (6, 4, 2)
    text = "\n".join(lines(found, 32, buckets.generate(32 * 32, 8)))
    assert text.startswith("6 images: 4 usable, 2 not")
    assert "1 (25.0 %) have a short side below 32 px" in text
    assert "PNG 3, JPEG 1" in text and "RGB 3, L 1" in text
    assert "captions    2 of 4" in text and "'picture 1'" in text
    assert "24 x 40" in text and "40 x 24" in text
    assert "1  the file is empty" in text and "e.png" in text and "f.png" in text


def test_a_sample_of_a_large_source_is_spread_and_always_the_same(image_folder: Path) -> None:
    source = open_source(image_folder)
    first = [found.index for found in survey(source, max_images=5).findings]
    assert len(set(first)) == 5 and first == sorted(first) and first[-1] > 5
    assert [found.index for found in survey(source, max_images=5, num_workers=1).findings] == first
    assert "12 images, 5 of them looked at" in lines(survey(source, 5), 32, [(32, 32)])[0]


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["ldm-vae", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int)
    return done.value.code


def test_the_command(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "look.png"
    assert inspect(monkeypatch, mixed, "--thumbnails", picture, "--num_workers", 0) == 0
    assert "6 images: 4 usable, 2 not" in capsys.readouterr().out
    sheet = np.array(Image.open(picture))
    assert sheet.shape == (128, 4 * 128, 3)
    assert np.abs(sheet[64, 64:384:128, 0].astype(int) - (0, 80, 160)).max() <= 1


def test_a_stream(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(mixed / "a.png", "a.png")
        archive.add(mixed / "b.jpg", "b.jpg")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert inspect(monkeypatch, f"{tmp_path}/*.tar.gz", "--num_workers", 0) == 0
    out = capsys.readouterr().out
    assert "a stream of images" in out and "length unknown" in out


def test_thumbnails_do_not_become_images_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, 3, (16, 16))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert inspect(monkeypatch, ".", "--num_workers", 0) == 0
        assert "3 images" in (out := capsys.readouterr().out) and "no thumbnails" in out
    assert inspect(monkeypatch, ".", "--thumbnails", "look.png") == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_wrong_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk.png").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    assert inspect(monkeypatch, tmp_path, "--num_workers", 0) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: data {re.escape(str(tmp_path))}: no usable image: .+\n", error)
    assert not (tmp_path / "inspect.png").exists()
    assert inspect(monkeypatch, tmp_path / "gone") == 2
    assert inspect(monkeypatch, tmp_path, "--max_images", "-1") == 2
    assert inspect(monkeypatch, tmp_path, "--thumbnails", tmp_path / "no" / "x.png") == 2
    assert "Traceback" not in capsys.readouterr().err
