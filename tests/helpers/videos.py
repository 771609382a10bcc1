"""Tiny videos, written with PyAV: every frame says its number in its colour."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

STEP = 12  # levels from frame to frame


def level(number: int) -> int:
    """The grey of a frame: what a lossy codec changes it by is less than half a step."""
    return 8 + STEP * (number % 20)


def frame(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray[Any, Any]:
    """[H, W, 3]: grey by its number, red in the left upper corner."""
    picture = np.full((*size, 3), level(number), np.uint8)
    picture[: size[0] // 4, : size[1] // 4] = (255, 0, 0)
    return picture


def number_of(pixels: Any) -> int:
    """The number in a frame uint8 [C, H, W], by its right lower corner."""
    return round((float(pixels[:, -4:, -4:].float().mean()) - 8) / STEP)


def write_video(
    path: Path,
    frames: int = 17,
    size: tuple[int, int] = (32, 48),
    *,
    codec: str = "ffv1",
    pix_fmt: str | None = None,
    rate: Fraction | int = 25,
    stamps: Sequence[int] | None = None,
    rotation: int | None = None,
    sound: bool = False,
    streams: int = 1,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    pictures: Sequence[Any] | None = None,
    **context: Any,
) -> Path:
    """A video; `stamps` in milliseconds are those of its frames, `context` attributes of the encoder."""
    formats = {"ffv1": "bgr0", "libx264rgb": "rgb24"}
    with av.open(str(path), "w", options=container or {}) as file:
        chosen = []
        for _ in range(streams):
            stream: Any = file.add_stream(codec, rate=rate, options=dict(options or {}))
            stream.width, stream.height = size[1], size[0]
            stream.pix_fmt = pix_fmt or formats.get(codec, "yuv420p")
            for name, value in context.items():
                setattr(stream.codec_context, name, value)
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if stamps is not None:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
            chosen.append(stream)
        speech: Any = file.add_stream("aac" if path.suffix == ".mp4" else "pcm_s16le", rate=16000) if sound else None
        for number in range(frames):
            array = frame(number, size) if pictures is None else np.asarray(pictures[number])
            for stream in chosen:
                picture = av.VideoFrame.from_ndarray(array, format="rgba" if array.shape[2] == 4 else "rgb24")
                if stamps is not None:
                    picture.pts, picture.time_base = stamps[number], Fraction(1, 1000)
                file.mux(stream.encode(picture))
        for stream in chosen:
            file.mux(stream.encode())
        if speech is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            silence.sample_rate = 16000
            file.mux(speech.encode(silence))
            file.mux(speech.encode())
    return path


def write_moving(folder: Path, count: int = 3, frames: int = 10, size: tuple[int, int] = (32, 48)) -> Path:
    """A folder of videos, film-0.mkv and so on, of a disc that moves over a gradient, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for number in range(count):
        pictures = []
        for place in range(frames):
            picture = np.stack([40 + columns * 2, 60 + rows * 3, 90 + 0 * rows], axis=-1).astype(np.uint8)
            centre = 8 + 3 * number + 2 * place, 16 + 6 * np.sin(place / 2 + number)
            inside = (columns - centre[0]) ** 2 + (rows - centre[1]) ** 2 < 40 + 10 * number
            picture[inside] = 250 - 60 * number, 200, 30
            pictures.append(picture)
        write_video(folder / f"film-{number}.mkv", frames, size, pictures=pictures, rate=12)
    return folder


def write_films(folder: Path, count: int = 12, *, damaged: Sequence[int] = (), short: Sequence[int] = ()) -> Path:
    """Videos of 5 and 10 frames by turns, each fourth an image; the damaged ones end in their middle (even
    ones in their header), short ones have three frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pictures = [frame(number + at, (16, 24)) for at in range(3 if number in short else 5 * (1 + number % 2))]
        path = folder / f"film_{number:02d}.mkv"
        if number % 4 == 3 and number not in (*damaged, *short):
            Image.fromarray(pictures[0]).save(path.with_suffix(".png"))
            continue
        write_video(path, len(pictures), (16, 24), pictures=pictures)
        if number in damaged:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if number % 2 else 40])
    return folder


def films_of(folder: Path) -> list[str]:
    """Keys of the clips of five frames, and of the images, that are sound in such a folder of videos; in order."""
    found = []
    for path in sorted(folder.iterdir()):
        number = int(path.stem[-2:])
        parts = ["#t=0", "#t=0.2"] if path.suffix == ".mkv" and number % 2 else [""]
        found += [path.name + part for part in parts]
    return found
