"""`eval.speed video`: from video files to normalised float batches of clips, per core.

- `video`: ldm_vae's training loader on clips of 17 frames at 128 px, then `to_pixels`;
- `plain_video_loop`: what training scripts do: each clip's file is opened and decoded from its start to the wanted
  frames, these are resized one by one with Pillow, stacked and batched by a DataLoader;
- `clip_decode`: ldm_vae's decoding of those clips alone, and `bare_av`: PyAV's, of the same frames by the same seeks.

All in this process with one thread, in CPU seconds, so a figure is that of one core. The videos are moving parts of
scikit-image's and scikit-learn's photographs with a little grain: h264, 640 x 360, 8 s at 25 frames/s, a key frame each
2 s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ldm_vae.core import rng
from ldm_vae.data.clips import frames_of
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.footage import Video
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import TransformConfig, to_pixels

from .data import write_photographs
from .timing import interleave, row

FRAMES, RESOLUTION, BATCH, VIDEOS = 17, 128, 2, 6
LENGTH, RATE, SIZE = 200, 25, (640, 360)
DECODING = Decoding(frames=FRAMES)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(Path(folder), options)
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    films = write_films(folder)
    starts = [_start(number) for number in range(VIDEOS)]
    ours = _ours(films[0].parent)
    plain = DataLoader(_Plain(films), BATCH, shuffle=True)
    contenders = {
        "plain_video_loop": lambda: _consume(iter(plain), VIDEOS // BATCH),
        "video": lambda: _consume(ours, VIDEOS // BATCH),
        "bare_av": lambda: [_bare(film, start) for film, start in zip(films, starts, strict=True)],
        "clip_decode": lambda: [_decode(film, start) for film, start in zip(films, starts, strict=True)],
    }
    for film, start in zip(films, starts, strict=True):
        same = zip(_bare(film, start), _decode(film, start), strict=True)
        assert all(
            (own.permute(1, 2, 0).numpy() == theirs).all() for theirs, own in same
        )  # the same frames, to the bit
    times = interleave(contenders, options.rounds, "video", clock=time.process_time)
    beside = {"plain_video_loop": None, "video": "plain_video_loop", "bare_av": None, "clip_decode": "bare_av"}
    clips = VIDEOS * FRAMES
    return [
        row(name, times, name, to, frames_per_s=clips / statistics.median(times[name])) for name, to in beside.items()
    ]


def _start(number: int) -> int:
    """The frame at which the clip of video `number` begins."""
    return int(rng.generator(0, "start", number).integers(LENGTH - FRAMES))


def write_films(folder: Path) -> list[Path]:
    """The videos, in folder/films."""
    photographs = write_photographs(folder / "photographs", VIDEOS, (960, 720))
    (folder / "films").mkdir()
    films = []
    for number, photograph in enumerate(photographs):
        draw = np.random.default_rng(number)
        whole = np.asarray(Image.open(photograph).convert("RGB"))
        film = folder / "films" / f"{number}.mp4"
        with av.open(str(film), "w") as file:
            stream: Any = file.add_stream("libx264", rate=RATE, options={"g": str(2 * RATE), "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            for at in range(LENGTH):
                left, top = round(1.5 * at), round(1.5 * at)
                part = whole[top : top + SIZE[1], left : left + SIZE[0]].astype(np.int16)
                grainy = (part + draw.integers(-4, 5, part.shape[:2])[:, :, None]).clip(0, 255).astype(np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(grainy, format="rgb24")))
            file.mux(stream.encode())
        films.append(film)
    return films


def _ours(folder: Path) -> Iterator[torch.Tensor]:
    source = open_source(folder, frames=FRAMES)
    loader = training_loader(source, TransformConfig(), RESOLUTION, seed=0, batch_size=BATCH)
    return (to_pixels(batch.pixels) for batch in loader)


class _Plain(Dataset[torch.Tensor]):
    def __init__(self, films: list[Path]) -> None:
        self.films = films
        self.transform = v2.Compose(
            [v2.Resize(RESOLUTION), v2.CenterCrop(RESOLUTION), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        )

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index: int) -> torch.Tensor:
        with av.open(str(self.films[index])) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            start = int(np.random.default_rng().integers(stream.frames - FRAMES + 1))
            wanted = islice(file.decode(stream), start, start + FRAMES)
            frames = [self.transform(frame.to_image()) for frame in wanted]
        clip = torch.stack(frames, dim=1)
        return (clip - 0.5) / 0.5


def _consume(batches: Iterator[torch.Tensor], steps: int) -> None:
    for batch in islice(batches, steps):
        assert batch.shape == (BATCH, 3, FRAMES, RESOLUTION, RESOLUTION) and batch.dtype == torch.float32


def _decode(film: Path, start: int) -> list[torch.Tensor]:
    return [found.pixels for found in frames_of(Video(str(film), start=Fraction(start, RATE)), DECODING)]


def _bare(film: Path, start: int) -> list[Any]:
    frames: list[Any] = []
    with av.open(str(film)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        first = round(start / RATE / stream.time_base)
        file.seek(first, stream=stream)
        for frame in file.decode(stream):
            if frame.pts >= first:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == FRAMES:
                break
    return frames
