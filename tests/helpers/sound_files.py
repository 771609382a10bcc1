"""Sounds of the tests: tones and noise, written as files of each format."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 8000


def tone(samples: int, channels: int = 1, rate: int = RATE, frequency: float = 440.0) -> Any:
    """float32 [samples, channels]: a tone, of another phase in each channel, and a little noise."""
    time = np.arange(samples)[:, None] / rate
    noise = np.random.default_rng(0).standard_normal((samples, channels))
    return (0.4 * np.sin(2 * np.pi * frequency * time + np.arange(channels)) + 0.01 * noise).astype(np.float32)


def encoded(samples: Any, form: str = "WAV", rate: int = RATE, subtype: str | None = None) -> bytes:
    """A file of these samples [S, C]; "m4a" by FFmpeg, all others by libsndfile."""
    buffer = io.BytesIO()
    if form != "m4a":
        soundfile.write(buffer, samples, rate, format=form, subtype=subtype or ("FLOAT" if form == "WAV" else None))
        return buffer.getvalue()
    import av

    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=rate)
        stream.layout = "stereo" if samples.shape[1] == 2 else "mono"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=stream.layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


def write_sounds(folder: Path, count: int = 4, samples: int = RATE // 2, channels: int = 1) -> Path:
    """A folder of WAVs, each another tone."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        content = encoded(tone(samples, channels, frequency=220.0 * (number + 1)))
        (folder / f"tone{number}.wav").write_bytes(content)
    return folder


def excerpts_of(folder: Path, samples: int, excerpt: int) -> list[str]:
    """Keys of the excerpts of such a folder of sounds, of so many samples each; in order."""
    starts = [number / RATE for number in range(0, samples, excerpt)]
    return [path.name + (f"#t={start:g}" if start else "#t=0") for path in sorted(folder.iterdir()) for start in starts]
