"""Clips: the law of time on every container, damage, and what is said of a video."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentences import refused
from videos import frame, number_of, write_video

from ldm_vae.core.errors import UsageError
from ldm_vae.data import clips, containers
from ldm_vae.data.clips import crops_of, facts_of, first_frame, frames_of, reach, tiles_of
from ldm_vae.data.decoding import Decoding, read_image
from ldm_vae.data.footage import Video
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import image_bytes, image_checksum, open_source
from ldm_vae.data.transforms import TransformConfig, centre_crop, random_crop
from ldm_vae.data.windows import windows

FIVE = Decoding(frames=5)
CONTAINERS = [
    ("a.mkv", "ffv1"), ("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"),
    ("a.ts", "libx264"), ("a.flv", "libx264"), ("a.h264", "libx264"),
]  # fmt: skip


def numbers(image: Any, decoding: Decoding, start: float | Fraction | None = None) -> list[int]:
    if start is not None:
        image = replace(image, start=Fraction(start))
    return [number_of(found.pixels) for found in frames_of(image, decoding)]


@pytest.mark.parametrize(("name", "codec"), CONTAINERS)
def test_a_clip_is_the_frames_from_its_start_on_in_every_container(tmp_path: Path, name: str, codec: str) -> None:
    video = Video(str(write_video(tmp_path / name, codec=codec, options={"g": "4"})))
    known = facts_of(video, FIVE)
    assert (known.frames, known.rate, known.height, known.width) == (17, 25, 32, 48)
    count, length = tiles_of(known, FIVE)
    assert [numbers(video, FIVE, number * length) for number in range(count)] == [
        list(range(first, first + 5)) for first in (0, 5, 10)
    ]
    assert numbers(video, FIVE, Fraction(12, 25)) == [12, 13, 14, 15, 16]
    assert numbers(Video(Path(str(video.content)).read_bytes()), FIVE, Fraction(12, 25)) == [12, 13, 14, 15, 16]
    with pytest.raises(BadImage, match=r"ends at 0\.68 s"):
        numbers(video, FIVE, Fraction(14, 25))


def test_frames_are_counted_where_the_last_packets_do_not_tell(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    for name, codec in (("a.mpg", "mpeg2video"), ("a.ts", "libx264"), ("a.flv", "libx264"), ("a.h264", "libx264")):
        path = write_video(tmp_path / name, 40, (64, 96), codec=codec, options={"g": "12"}, pictures=noise)
        assert facts_of(Video(str(path)), FIVE).frames == 40


def test_stride_and_rate_take_the_last_frame_that_is_not_after_the_time(tmp_path: Path) -> None:
    video = Video(str(write_video(tmp_path / "a.mkv", rate=30)))  # stamps are rounded to milliseconds: 33, 67, 100
    assert numbers(video, Decoding(frames=5, frame_stride=3)) == [0, 3, 6, 9, 12]
    assert numbers(video, Decoding(frames=5, frame_rate=10)) == [0, 3, 6, 9, 12]
    assert numbers(video, Decoding(frames=5, frame_rate=20)) == [0, 1, 3, 4, 6]
    assert numbers(video, Decoding(frames=5, frame_rate=60)) == [0, 0, 1, 1, 2]
    assert numbers(video, Decoding(frames=5, frame_rate=20, frame_stride=2)) == [0, 3, 6, 9, 12]


def test_time_stamps_that_vary_decide(tmp_path: Path) -> None:
    stamps = [0, 40, 80, 400, 440, 480, 800, 840, 880]
    video = Video(str(write_video(tmp_path / "a.mkv", 9, stamps=stamps)))
    assert numbers(video, Decoding(frames=5, frame_rate=10)) == [0, 2, 2, 2, 3]
    assert numbers(video, Decoding(frames=3, frame_rate=2.5)) == [0, 3, 6]
    jittered = Video(str(write_video(tmp_path / "b.mkv", 9, stamps=[0, 41, 79, 121, 160, 199, 242, 280, 320])))
    assert numbers(jittered, Decoding(frames=9)) == list(range(9))
    later = Video(str(write_video(tmp_path / "c.mkv", 9, stamps=[500 + 40 * number for number in range(9)])))
    assert numbers(later, Decoding(frames=9)) == list(range(9)) and facts_of(later, FIVE).frames == 9


def test_a_start_is_drawn_evenly_from_those_that_leave_room(tmp_path: Path) -> None:
    video = Video(str(write_video(tmp_path / "a.mkv", 9)))
    draws = [number_of(next(frames_of(video, FIVE, draw / 10 + 0.05)).pixels) for draw in range(10)]
    assert draws == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    strided = [number_of(next(frames_of(video, Decoding(frames=3, frame_stride=4), draw)).pixels) for draw in (0, 0.99)]
    assert strided == [0, 0]


def test_a_long_file_is_read_where_its_clip_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (7, 96, 96, 3), dtype=np.uint8)
    pictures = [noise[number % 7] // 8 + np.uint8(number * 7 % 220) for number in range(600)]
    few = {"g": "10", "qp": "12", "preset": "ultrafast"}
    path = write_video(tmp_path / "long.mp4", 600, (96, 96), codec="libx264", options=few, pictures=pictures)
    video = Video(str(path), start=Fraction(16))
    facts_of(video, FIVE)
    decoded: list[int] = []
    read: list[int] = []
    frames = containers._Open.frames

    def counted(self: Any) -> Any:
        for found in frames(self):
            decoded.append(found[0])
            yield found

    class Meter(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(containers._Open, "frames", counted)
    monkeypatch.setattr(Video, "open", lambda self: Meter(str(self.content)))
    found = [float(read.pixels.float().mean()) for read in frames_of(video, FIVE)]
    assert found == pytest.approx([float(picture.mean()) for picture in pictures[400:405]], abs=3)
    assert len(decoded) <= 15
    assert sum(read) < path.stat().st_size / 5


def test_an_hour_costs_what_its_clips_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,800 frames, 67 MB: 720 clips of every third, whose places are known at once."""
    import av
    import psutil

    path, kinds = tmp_path / "hour.mkv", 20
    pictures = [av.VideoFrame.from_ndarray(frame(number, (64, 64)), format="rgb24") for number in range(kinds)]
    pictures = [picture.reformat(format="yuv420p") for picture in pictures]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("rawvideo", rate=3)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(10_800):
            pictures[number % kinds].pts = number
            file.mux(stream.encode(pictures[number % kinds]))
        file.mux(stream.encode())
    read: list[int] = []

    class Meter(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(Video, "open", lambda self: Meter(str(self.content)))
    before = psutil.Process().memory_info().rss
    source = windows(open_source(tmp_path, frames=5, frame_stride=3))
    assert len(source) == 720 and source.key(719) == "hour.mkv#t=3595"
    for index in (0, 300, 719):
        found = [number_of(each.pixels) for each in frames_of(source[index].image, source.decoding)]
        assert found == [(index * 15 + 3 * at) % kinds for at in range(5)]
    assert sum(read) < path.stat().st_size / 10
    assert psutil.Process().memory_info().rss - before < path.stat().st_size / 2


def test_each_frame_is_cut_as_an_image_is(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (3, 40, 64, 3), dtype=np.uint8)
    video = Video(str(write_video(tmp_path / "a.mkv", 3, (40, 64), pictures=pictures)))
    found = [read.pixels for read in frames_of(video, Decoding(frames=3))]
    assert all(
        torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(own)) for pixels, own in zip(found, pictures, strict=True)
    )
    (crop,), first = crops_of(video, Decoding(frames=3), lambda pixels, size: (centre_crop(pixels, 16, size),))
    assert crop.pixels.shape == (3, 3, 16, 16) and first.original_size == (40, 64)
    for number, picture in enumerate(pictures):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        image = read_image(png.getvalue()).pixels
        assert torch.equal(centre_crop(image, 16).pixels, crop.pixels[:, number])
        for cut in (TransformConfig(), TransformConfig(resize="none")):
            same = [random_crop(one, 16, cut, np.random.default_rng(3)).pixels for one in (image, found[number])]
            assert torch.equal(*same)


def test_colours_follow_matrix_range_and_depth_of_the_file(tmp_path: Path) -> None:
    import av

    def red(name: str, space: int, limits: int, values: tuple[int, int, int]) -> list[int]:
        with av.open(str(tmp_path / name), "w") as file:
            stream: Any = file.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
            stream.codec_context.colorspace, stream.codec_context.color_range = space, limits
            picture = av.VideoFrame(32, 32, "yuv444p")
            for plane, value in zip(picture.planes, values, strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            picture.colorspace, picture.color_range = space, limits
            file.mux(stream.encode(picture))
            file.mux(stream.encode())
        pixels = first_frame(Video(str(tmp_path / name)), Decoding(frames=1)).pixels
        return pixels[:, 0, 0].tolist()

    assert red("601.mkv", 5, 1, (81, 90, 240)) == pytest.approx([255, 0, 0], abs=2)
    assert red("709.mkv", 1, 1, (63, 102, 240)) == pytest.approx([255, 0, 0], abs=2)
    assert red("full.mkv", 1, 2, (54, 99, 255)) == pytest.approx([254, 0, 0], abs=2)
    deep = Video(str(write_video(tmp_path / "deep.mp4", 5, codec="libx264", pix_fmt="yuv420p10le")))
    assert numbers(deep, FIVE) == [0, 1, 2, 3, 4]


def test_alpha_lies_over_the_background_and_channels_are_those_of_images(tmp_path: Path) -> None:
    pictures = np.full((2, 32, 32, 4), (200, 100, 50, 128), np.uint8)
    video = Video(str(write_video(tmp_path / "a.mkv", 2, (32, 32), pix_fmt="bgra", pictures=pictures)))
    for decoding in (Decoding(frames=2), Decoding(1, frames=2), Decoding(4, alpha=True, frames=2)):
        png = io.BytesIO()
        Image.fromarray(pictures[0]).save(png, "PNG")
        expected = read_image(png.getvalue(), replace(decoding, frames=None)).pixels
        assert all(torch.equal(found.pixels, expected) for found in frames_of(video, decoding))


def test_a_frame_stands_upright_and_odd_sizes_are_whole(tmp_path: Path) -> None:
    turned = Video(str(write_video(tmp_path / "r.mp4", 5, codec="libx264rgb", rotation=-90)))  # clockwise, as phones do
    found = first_frame(turned, FIVE)
    assert found.original_size == (48, 32) and facts_of(turned, FIVE).height == 48
    upright = torch.rot90(torch.from_numpy(frame(0)).permute(2, 0, 1), -1, (1, 2))
    assert (found.pixels.int() - upright.int()).abs().max() <= 8
    odd = Video(str(write_video(tmp_path / "odd.mkv", 5, (33, 47))))
    assert [read.pixels.shape for read in frames_of(odd, FIVE)] == [(3, 33, 47)] * 5
    assert torch.equal(first_frame(odd, FIVE).pixels, torch.from_numpy(frame(0, (33, 47))).permute(2, 0, 1))


def test_what_is_ignored_is_told(tmp_path: Path) -> None:
    notes = {
        "sound": facts_of(Video(str(write_video(tmp_path / "s.mp4", codec="libx264", sound=True))), FIVE).notes,
        "two": facts_of(Video(str(write_video(tmp_path / "t.mkv", streams=2))), FIVE).notes,
        "deep": facts_of(
            Video(str(write_video(tmp_path / "d.mp4", codec="libx264", pix_fmt="yuv420p10le"))), FIVE
        ).notes,
        "pq": facts_of(Video(str(write_video(tmp_path / "h.mp4", codec="libx264", color_trc=16))), FIVE).notes,
        "laced": facts_of(
            Video(str(write_video(tmp_path / "i.mp4", codec="libx264", options={"x264-params": "tff=1"}))), FIVE
        ).notes,
        "wide": facts_of(
            Video(str(write_video(tmp_path / "w.mp4", codec="libx264", sample_aspect_ratio=Fraction(4, 3)))), FIVE
        ).notes,
        "alpha": facts_of(
            Video(str(write_video(tmp_path / "v.webm", codec="libvpx-vp9", pix_fmt="yuva420p"))), FIVE
        ).notes,
        "plain": facts_of(Video(str(write_video(tmp_path / "p.mp4", codec="libx264"))), FIVE).notes,
    }
    assert notes == {
        "sound": ("audio, ignored",),
        "two": ("several video streams, the first is read",),
        "deep": ("more than 8 bits, kept as 8",),
        "pq": ("HDR (PQ), and not tone-mapped",),
        "laced": ("interlaced, and not deinterlaced",),
        "wide": ("pixels that are not square, taken as they are",),
        "alpha": ("alpha of VP8 or VP9, ignored",),
        "plain": (),
    }


def test_animated_images_are_videos_of_pillows_frames(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame(number)) for number in range(6)]
    for kind in ("GIF", "PNG", "WEBP"):
        place = tmp_path / f"a.{kind.lower()}"
        lossless = {"lossless": True} if kind == "WEBP" else {}
        pictures[0].save(place, kind, save_all=True, append_images=pictures[1:], duration=40, **lossless)
        data = place.read_bytes()
        known = facts_of(data, FIVE)
        assert (known.frames, known.rate, known.format) == (6, 25, kind)
        assert numbers(data, FIVE) == [0, 1, 2, 3, 4]
        assert numbers(Video(data), Decoding(frames=2), Fraction(4, 25)) == [4, 5]
        assert torch.equal(first_frame(data, FIVE).pixels, read_image(data).pixels)
    delays = [20, 80, 300, 0, 40, 40]
    pictures[0].save(tmp_path / "b.gif", save_all=True, append_images=pictures[1:], duration=delays)
    assert numbers((tmp_path / "b.gif").read_bytes(), Decoding(frames=5, frame_rate=10)) == [0, 2, 2, 2, 3]


def test_an_animated_picture_that_would_take_hours_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    pictures = [Image.new("L", (8, 8), number) for number in range(9)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    strip = bytearray(file.getvalue())
    strip[6:8] = (65_000).to_bytes(2, "little")  # the width of its canvas
    monkeypatch.setattr(clips, "_times", lambda animation: pytest.fail("frames were composed"))
    for call in (facts_of, lambda image, decoding: list(frames_of(image, decoding))):
        with pytest.raises(BadImage, match="longer than 32 times its width"):
            call(bytes(strip), FIVE)
    monkeypatch.setattr(clips, "MOST_ANIMATED", 9 * 64 - 1)
    with pytest.raises(BadImage, match=r"9 frames of 8 x 8 pixels, the limit of an animated picture is 0\.0 billion"):
        facts_of(file.getvalue(), FIVE)


def test_an_image_is_a_clip_of_one_frame() -> None:
    png = io.BytesIO()
    Image.fromarray(frame(3)).save(png, "PNG")
    (crop,), _ = crops_of(png.getvalue(), FIVE, lambda pixels, size: (centre_crop(pixels, 16, size),), draw=0.7)
    assert crop.pixels.shape == (3, 1, 16, 16)
    assert torch.equal(crop.pixels[:, 0], centre_crop(read_image(png.getvalue()).pixels, 16).pixels)
    known = facts_of(png.getvalue(), FIVE)
    assert (known.frames, reach(known, FIVE), tiles_of(known, FIVE)) == (1, 1, (1, 0))


def reason(image: Any, decoding: Decoding = FIVE) -> str:
    with pytest.raises(BadImage) as error:
        list(frames_of(image, decoding))
    return error.value.reason


def test_a_short_video_is_refused_and_says_by_how_much(tmp_path: Path) -> None:
    video = Video(str(write_video(tmp_path / "a.mkv", 9)))
    assert reason(video, Decoding(frames=10)) == "9 frames in 0.36 s: 9 of the 10 of a clip"
    assert reason(video, Decoding(frames=5, frame_rate=10)) == "9 frames in 0.36 s: 4 of the 5 of a clip at 10/s"
    assert reason(video, Decoding(frames=4, frame_stride=3)) == "9 frames in 0.36 s: 3 of the 4 of a clip, every 3th"


def test_time_stamps_that_cannot_be_are_not_believed(tmp_path: Path) -> None:
    far = Video(str(write_video(tmp_path / "far.mkv", 9, stamps=[40 * number for number in range(8)] + [2 * 10**9])))
    assert facts_of(far, FIVE).frames == 9


def test_damage_is_a_reason(tmp_path: Path) -> None:
    whole = write_video(
        tmp_path / "a.mp4", 40, codec="libx264", options={"g": "10"}, container={"movflags": "faststart"},
        pictures=np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8),
    ).read_bytes()  # fmt: skip
    cut = Video(whole[: len(whole) * 6 // 10])
    assert len(list(frames_of(cut, FIVE))) == 5  # before the damage nothing is wrong
    assert "is cut off or damaged" in reason(replace(cut, start=Fraction(1)), Decoding(frames=10))
    noise = np.random.default_rng(0).integers(0, 256, (32, 120, 3), dtype=np.uint8)
    moved = [noise[:, number : number + 48] for number in range(40)]
    data = write_video(tmp_path / "b.mkv", 40, codec="mpeg2video", options={"g": "10"}, pictures=moved).read_bytes()
    wounded = bytearray(data)
    for place in range(5):
        wounded[len(data) * 4 // 10 + 9 * place] ^= 255
    # the fifth frame is guessed, and all that refer to it up to the next key frame are wrong
    for start in (2, 6):
        told = reason(Video(bytes(wounded), start=Fraction(start, 25)), Decoding(frames=3))
        assert told == "is cut off or damaged behind 0.12 s: FFmpeg had to invent parts"
    assert len(list(frames_of(Video(bytes(wounded), start=Fraction(20, 25)), FIVE))) == 5
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "none.mkv", 0, sound=True)
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html></html>")
    assert [reason(Video(str(tmp_path / name))) for name in ("empty.mp4", "none.mkv", "absent.mp4", "page.mp4")] == [
        "it is empty",
        "holds no frame that can be decoded",
        "no such file (it vanished, or never was)",
        "it is a web page (HTML) in the place of the file; download the file itself",
    ]
    assert "no video stream" in reason(Video(str(_sound_alone(tmp_path / "sound.mkv"))))
    sizes = [Image.fromarray(frame(number, (32, 48 if number < 3 else 40))) for number in range(6)]
    for number, picture in enumerate(sizes):
        picture.save(tmp_path / f"f{number}.png")
    paths = tuple(str(tmp_path / f"f{number}.png") for number in range(6))
    assert reason(Video(paths)) == "changes its size from 32 x 48 to 32 x 40 (f3.png)"


def _sound_alone(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("pcm_s16le", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16000
        file.mux(stream.encode(silence))
    return path


def test_a_playlist_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # FFmpeg takes the paths in a list for those from here
    write_video(tmp_path / "inner.ts", codec="libx264")
    for name, text in (
        ("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ninner.ts\n#EXT-X-ENDLIST\n"),
        ("concat.mp4", "ffconcat version 1.0\nfile inner.ts\n"),
    ):
        (tmp_path / name).write_text(text)
        assert reason(Video(str(tmp_path / name))).startswith("not a video that can be read")


def test_knobs_that_do_nothing_are_refused() -> None:
    for knobs in ({"frame_rate": 8.0}, {"frame_stride": 2}):
        with refused(UsageError, "frames"):
            Decoding(**knobs)  # type: ignore[arg-type]
    with refused(UsageError, "jpeg_draft"):
        Decoding(frames=5, jpeg_draft=True)


def test_checksum_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = write_video(tmp_path / "a.mkv")
    data = path.read_bytes()
    assert (
        image_checksum(Video(str(path), start=Fraction(1))) == hashlib.sha256(data).hexdigest() == image_checksum(data)
    )
    assert image_bytes(Video(str(path))) == len(data)
    (tmp_path / "member").write_bytes(b"x" * 10 + data + b"y" * 10)
    member = Video(str(tmp_path / "member"), 10, len(data))
    assert image_checksum(member) == image_checksum(data) and image_bytes(member) == len(data)
    assert numbers(member, FIVE, Fraction(1, 5)) == [5, 6, 7, 8, 9]
