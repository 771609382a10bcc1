"""Sounds: excerpts by seeking from every format, at another rate, of other channels, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soxr
import torch
from cli_call import call
from sentences import refused
from sound_files import RATE, encoded, tone, write_sounds

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import sounds, survey_sounds
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.footage import Video
from ldm_vae.data.ordered import ordered_loader
from ldm_vae.data.preprocessing import Preprocessing, parse
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import TransformConfig, decoding_of, preprocessing_identity
from ldm_vae.data.windows import windows

MONO = Decoding(channels=1, sample_rate=RATE)
FORMATS = ["WAV", "FLAC", "OGG", "MP3", "AIFF", "m4a"]


def excerpt(content: Any, decoding: Decoding, draw: float | None = None) -> tuple[torch.Tensor, Any]:
    (crop,), _ = sounds.crops_of(content, decoding, draw)
    return crop.pixels, crop.box


def at(content: bytes, start: int, decoding: Decoding) -> torch.Tensor:
    return excerpt(Video(content, start=Fraction(start, decoding.sample_rate or 1)), decoding)[0]


@pytest.mark.parametrize("form", FORMATS)
def test_an_excerpt_is_that_part_of_the_whole(form: str) -> None:
    """Found by seeking, to the sample; of AAC, whose frames overlap, to its own noise."""
    rate = 44100 if form in ("MP3", "m4a") else RATE
    content = encoded(tone(5 * rate, 2, rate), form, rate)
    decoding = Decoding(channels=2, sample_rate=rate)
    whole, _ = excerpt(content, decoding)
    assert whole.dtype == torch.float32 and whole.shape[0] == 2
    assert abs(whole.shape[1] - 5 * rate) <= (2048 if form == "m4a" else 0)
    # what was written, in its place
    written = torch.from_numpy(tone(5 * rate, 2, rate).T)
    assert float((whole[:, 3000:-3000] - written[:, 3000 : whole.shape[1] - 3000]).abs().max()) < 0.06
    for start in (17, rate + 3, 4 * rate + 1):
        found = at(content, start, replace(decoding, samples=1000))
        limit = 0.05 if form == "m4a" else 0.0  # noise that a decoder draws
        assert float((found - whole[:, start : start + 1000]).abs().max()) <= limit


def bursts(samples: int, channels: int, rate: int) -> Any:
    """Noise that comes and goes: a codec of varying rate keeps its bits for what comes."""
    time, noise = np.arange(samples)[:, None] / rate, np.random.default_rng(0).standard_normal((samples, channels))
    return (0.3 * noise * np.exp(-20 * (time % 0.25)) * (time % 1 < 0.6)).astype(np.float32)


@pytest.mark.parametrize(("form", "subtype"), [("MP3", None), ("OGG", None), ("WAV", "GSM610")])
def test_a_codec_that_looks_back_is_read_from_before_the_excerpt(form: str, subtype: str | None) -> None:
    """Seeking by libsndfile: MP3 lacks the bits of frames before, the last page of a Vorbis file is off, and GSM 6.10
    cannot be sought in at all."""
    channels = 2 if form == "MP3" else 1
    content = encoded(bursts(3 * RATE, channels, RATE), form, subtype=subtype)
    decoding = Decoding(channels=channels, sample_rate=RATE)
    whole, _ = excerpt(content, decoding)
    for start in (RATE + 3, 2 * RATE + 999, int(2.6 * RATE)):
        found = at(content, start, replace(decoding, samples=1000))
        torch.testing.assert_close(found, whole[:, start : start + 1000], rtol=0, atol=1e-6)


def test_an_mp3_may_lack_its_last_frame() -> None:
    """As some encoders count it."""
    content = encoded(bursts(2 * RATE, 1, RATE), "MP3")
    whole, _ = excerpt(content[:-1], MONO)
    assert whole.shape == (1, 2 * RATE)
    with refused(BadImage, "ends"):
        excerpt(content[: len(content) // 2], MONO)


@pytest.mark.parametrize(("there", "wanted"), [(44100, 16000), (16000, 48000), (11025, 8000), (8001, 8000)])
def test_a_resampled_excerpt_is_that_part_of_the_whole(there: int, wanted: int) -> None:
    samples = tone(3 * there, 1, there)
    content, decoding = encoded(samples, rate=there), Decoding(channels=1, sample_rate=wanted)
    whole, _ = excerpt(content, decoding)
    assert whole.shape == (1, 3 * wanted)
    expected = soxr.resample(samples, there, wanted, quality="HQ")[:, 0]
    torch.testing.assert_close(whole[0], torch.from_numpy(expected), rtol=0, atol=1e-6)
    clean = 0.4 * np.sin(2 * np.pi * 440 * np.arange(3 * wanted) / wanted)
    assert float((whole[0, 500:-500] - torch.from_numpy(clean)[500:-500]).abs().max()) < 0.06  # its place in time
    for start in (1, wanted + 7, 2 * wanted + 999):
        found = at(content, start, replace(decoding, samples=800))
        torch.testing.assert_close(found, whole[:, start : start + 800], rtol=0, atol=2e-6)


def test_loudness_is_left_alone() -> None:
    loud = tone(2000) * 5
    found, _ = excerpt(encoded(loud), MONO)
    assert torch.equal(found[0], torch.from_numpy(loud[:, 0]))
    quiet = tone(2000) * 1e-3
    assert torch.equal(excerpt(encoded(quiet), MONO)[0][0], torch.from_numpy(quiet[:, 0]))


def test_channels_are_mixed_as_stated() -> None:
    stereo, mono = tone(500, 2), tone(500)
    found, _ = excerpt(encoded(stereo), MONO)
    torch.testing.assert_close(found[0], torch.from_numpy(stereo.mean(axis=1)))
    both, _ = excerpt(encoded(mono), replace(MONO, channels=2))
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], torch.from_numpy(mono[:, 0]))
    six = encoded(tone(500, 6))
    torch.testing.assert_close(excerpt(six, MONO)[0][0], torch.from_numpy(tone(500, 6).mean(axis=1)))
    with refused(BadImage, "6 channels"):
        excerpt(six, replace(MONO, channels=2))


def test_what_is_short_is_followed_by_silence() -> None:
    samples = tone(300)
    found, box = excerpt(encoded(samples), replace(MONO, samples=512), draw=0.9)
    assert found.shape == (1, 512) and box == (0, 0, 1, 300)
    assert torch.equal(found[0, :300], torch.from_numpy(samples[:, 0])) and not found[0, 300:].any()


def test_a_draw_is_one_of_all_starts() -> None:
    content, decoding = encoded(tone(104)), replace(MONO, samples=100)
    starts = [excerpt(content, decoding, draw)[1][1] for draw in np.linspace(0, 1, 51)]
    assert sorted({*starts}) == [0, 1, 2, 3, 4]
    assert max(starts.count(one) for one in range(5)) <= 12


# --- damage -----------------------------------------------------------------------------------------------------------


WORDS = {
    "empty": "empty", "text": "format", "page": "HTML", "pointer": "git-LFS", "header": "cut off", "cut": "cut off",
    "aiff cut": "cut off", "rf64 cut": "cut off", "w64 cut": "cut off", "au cut": "cut off", "no rate": "incomplete",
    "1 Hz": "1 Hz", "flac cut": "damaged", "no samples": "no sample", "nan": "NaN", "mp3 cut": "ends",
    "a picture": "format",
}  # fmt: skip


def damaged() -> dict[str, bytes]:
    wav, nan = encoded(tone(4000)), tone(4000)
    nan[1234] = np.nan
    flac, rate = encoded(tone(40000), "FLAC"), wav.index(b"fmt ") + 12
    return {
        "empty": b"",
        "text": b"a note about a sound, which is none " * 20,
        "page": b"<!DOCTYPE html><html></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "header": wav[:30],
        "cut": wav[:-2000],
        **{
            f"{form.lower()} cut": encoded(tone(4000), form, subtype="FLOAT")[:9000]
            for form in ("AIFF", "RF64", "W64", "AU")
        },
        **{
            name: wav[:rate] + bytes([hertz, 0, 0, 0]) + wav[rate + 4 :]
            for name, hertz in (("no rate", 0), ("1 Hz", 1))
        },
        "flac cut": flac[: len(flac) // 2],
        "no samples": encoded(tone(0)),
        "nan": encoded(nan),
        "mp3 cut": encoded(tone(40000), "MP3")[:5000],
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
    }


@pytest.mark.parametrize("name", WORDS)
def test_damage_has_a_reason(name: str) -> None:
    with refused(BadImage, WORDS[name]):
        excerpt(damaged()[name], MONO)


def test_a_wav_that_was_written_into_a_pipe_is_read() -> None:
    wav = bytearray(encoded(tone(400)))
    wav[4:8] = b"\xff\xff\xff\xff"
    assert excerpt(bytes(wav), MONO)[0].shape == (1, 400)


def test_an_array_is_no_sound() -> None:
    with refused(BadImage, "no file of sound"):
        excerpt(np.zeros((1, 100), np.float32), MONO)


def test_a_whole_sound_of_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MOST", 1000)
    with refused(BadImage, "too long"):
        excerpt(encoded(tone(1001)), MONO)
    assert at(encoded(tone(1001)), 900, replace(MONO, samples=100)).shape == (1, 100)


def test_an_hour_costs_what_its_excerpt_costs(tmp_path: Path) -> None:
    """Bytes that are read of a WAV of which a hole holds most."""
    path, head = tmp_path / "hour.wav", encoded(tone(10), subtype="PCM_16")
    size = 3600 * RATE * 2
    data = head.index(b"data")
    with path.open("wb") as file:
        file.write(head[:4] + (data + size).to_bytes(4, "little") + head[8 : data + 4] + size.to_bytes(4, "little"))
        file.truncate(data + 8 + size)
    read = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            count = super().readinto(buffer)
            read += count
            return count

    decoding = replace(MONO, samples=1000)
    video = Video(str(path), start=Fraction(3000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Video, "open", lambda self: Counted(str(path)))
        found, box = excerpt(video, decoding)
    assert found.shape == (1, 1000) and box == (0, 3000 * RATE, 1, 1000)
    assert 2000 <= read < 100_000


# --- settings and records ---------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings in ({"samples": 100}, {"sample_rate": RATE, "frames": 3}, {"sample_rate": RATE, "jpeg_draft": True}):
        with refused(UsageError, next(iter(settings))):
            Decoding(**settings)  # type: ignore[arg-type]


def test_the_record_and_the_identity_are_read_back() -> None:
    decoding = Decoding(channels=2, sample_rate=44100, samples=65536)
    record = Preprocessing.of(decoding)
    assert parse(record.to_bytes(), "x") == record and record.decoding == decoding and record.signal == "audio"
    assert b"resize" not in record.to_bytes() and b"sample_rate" not in Preprocessing.of(Decoding()).to_bytes()
    assert decoding_of(preprocessing_identity(decoding)) == decoding
    with refused(UsageError, "x"):
        parse(record.to_bytes().replace(b'"audio"', b'"image"'), "x")


# --- sources ----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"channels": 1, "sample_rate": RATE, "samples": 1024}


def test_every_kind_of_source_has_sounds(tmp_path: Path) -> None:
    folder = write_sounds(tmp_path / "sounds", 3, samples=2000)
    (folder / "notes.txt").write_text("not a sound")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted(folder.glob("*.wav")):
            archive.add(path, path.name)
    (tmp_path / "list.txt").write_text("".join(f"sounds/tone{number}.wav\n" for number in range(3)))
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.glob("*.wav"))]
    declared = {"info": {"features": {"wave": {"_type": "Audio"}}}}  # of `datasets`: decoded unless it is told not to
    table = pa.table({"wave": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(declared)}), tmp_path / "rows.parquet")
    found = []
    for data in (folder, tmp_path / "shard.tar", tmp_path / "list.txt", tmp_path / "rows.parquet"):
        source = windows(open_source(data, **FIELDS))
        batches = [sample for samples, bad in ordered_loader(source, 1, batch_size=2) for sample in samples]
        # 2000 samples are two excerpts, the second of which ends in silence
        assert len(source) == len(batches) == 6 and "excerpts" in repr(source)
        assert batches[1].key.endswith("#t=0.128") and batches[1].crop.box == (0, 1024, 1, 976)
        assert batches[1].crop.original_size == (1, 2000)
        found.append([sample.crop.pixels for sample in batches])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_folder_of_sounds_says_how_to_read_them(tmp_path: Path) -> None:
    write_sounds(tmp_path, 2)
    with refused(WorkError, "data"):
        open_source(tmp_path)


def test_batches_of_training_are_keyed(tmp_path: Path) -> None:
    folder = write_sounds(tmp_path, 3)
    (folder / "bad.wav").write_bytes(b"RIFF")
    source = open_source(folder, **FIELDS)

    def run(**layout: Any) -> list[Any]:
        loader = training_loader(source, TransformConfig(), 1, seed=5, batch_size=2, **layout)
        return [next(loader) for _ in range(4)]

    one, two = run(), run(num_workers=2)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.pixels, b.pixels) and a.pixels.shape == (2, 1, 1024) and a.pixels.dtype == torch.float32
    assert any(bad.key == "bad.wav" for batch in one for bad in batch.bad)
    # another epoch takes another place
    places = {(int(index), int(box[1])) for batch in one for index, box in zip(batch.indices, batch.boxes, strict=True)}
    assert len(places) > 4
    later = training_loader(source, TransformConfig(), 1, seed=5, batch_size=2, start_position=4)
    assert torch.equal(next(later).pixels, one[2].pixels)


def test_what_was_done_with_sounds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(tone(500, 2) * 4, rate=4000))
    list(ordered_loader(windows(open_source(tmp_path, **FIELDS)), 1, batch_size=2))
    said = caplog.text
    for what in ("above full scale", "mixed to mono", "4000 Hz are resampled to 8000", "followed by silence"):
        assert what in said


def test_a_survey_tells_of_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sounds(tmp_path / "sounds", 3)
    (folder / "wide.flac").write_bytes(encoded(tone(3 * 16000, 2, 16000), "FLAC", 16000))
    holed = tone(800)
    holed[700] = np.nan  # in its last part alone
    (folder / "holed.wav").write_bytes(encoded(holed))
    call("inspect", folder, "--sample_rate", 24000, "--num_workers", 0)
    said = capsys.readouterr().out
    for words in (
        "5 sounds: 4 usable, 1 not", "together    0:00:04", "rates       8000 Hz 3, 16000 Hz 1",
        "channels    mono 3, stereo 1", "formats     WAV 3, FLAC 1", "of [-1, 1]", "1  holds samples that are NaN",
    ):  # fmt: skip
        assert words in said
    assert "px" not in said and not list(tmp_path.glob("*.png"))
    for name, value in (("thumbnails", tmp_path / "look.png"), ("resolution", 512), ("bucket_step", 8)):
        with refused(UsageError, name):
            call("inspect", folder, "--sample_rate", 24000, f"--{name}", value)
    for path in folder.iterdir():
        path.write_bytes(b"no sound")
    with refused(WorkError, str(folder)):
        call("inspect", folder, "--sample_rate", 24000, "--num_workers", 0)
    assert "5 sounds: 0 usable, 5 not" in capsys.readouterr().out


def test_a_survey_hears_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_sounds, "PART", 256)
    loud = 0.1 * tone(1000)
    loud[900] = 0.75
    known, values = survey_sounds.look(encoded(loud))
    assert known.frames == 1000 and values.high == 0.75 and values.advice() == ""
