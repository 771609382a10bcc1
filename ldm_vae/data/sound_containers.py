"""Sound in containers that libsndfile does not read (AAC, WMA, the sound of videos), by PyAV (FFmpeg; extra `video`).

Legend: C channels, S samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_vae.data.containers import FORMATS
from ldm_vae.data.footage import Video
from ldm_vae.data.quarantine import BadImage

PRIMING = 1  # seconds before an excerpt from which FFmpeg decodes: a frame of AAC needs the one before it

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SoundFacts:
    """Facts about a sound from its header: S frames at `rate` a second, channels, container and codec."""

    frames: int
    rate: int
    channels: int
    format: str
    mode: str
    notes: tuple[str, ...] = ()

    def samples(self, rate: int) -> int:
        """L of it at another rate."""
        return -(-self.frames * rate // self.rate)


@contextlib.contextmanager
def _opened(file: Video) -> Iterator[tuple[Any, Any]]:
    """A container and its first stream of sound."""
    try:
        import av
    except ImportError as error:
        raise BadImage("is of a format that needs PyAV: pip install 'ldm-vae[video]'") from error
    formats = f"{FORMATS},aac,ac3,ape,wv,tta,amr,mp3,caf"
    with file.open() as raw:
        try:
            container: Any = av.open(raw, metadata_errors="ignore", container_options={"format_whitelist": formats})
        except av.error.FFmpegError as error:
            raise BadImage("is no sound of a known format, or damaged at its beginning") from error
        with container:
            if not container.streams.audio:
                raise BadImage("holds no stream of sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None or not stream.codec_context.sample_rate:
                raise BadImage("its stream of sound names no codec and rate that are known")
            stream.codec_context.thread_count = 1
            yield container, stream


def facts_by_ffmpeg(file: Video) -> SoundFacts:
    """Its length is that of its packets, none of which is decoded."""
    with _opened(file) as (container, stream):
        tick, rate = Fraction(stream.time_base), int(stream.codec_context.sample_rate)
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
        frames = round((max(ends, default=0) - max(0, stream.start_time or 0)) * tick * rate)
        name = f"{container.format.name.split(',')[0]}/{stream.codec_context.name}"
        return SoundFacts(frames, rate, int(stream.codec_context.channels), name, str(stream.codec_context.format.name))


def read_by_ffmpeg(file: Video, known: SoundFacts, first: int, count: int) -> Samples:
    import av

    found = np.zeros((count, known.channels), np.float32)
    end = 0
    with _opened(file) as (container, stream):
        tick, origin = Fraction(stream.time_base), max(0, stream.start_time or 0)
        if first > PRIMING * known.rate:
            container.seek(origin + int((Fraction(first, known.rate) - PRIMING) / tick), stream=stream)
        planar = av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            at = round((frame.pts - origin) * tick * known.rate) - first
            if at >= count:
                break
            for part in planar.resample(frame):
                values = part.to_ndarray().T
                if values.shape[1] != known.channels or frame.sample_rate != known.rate:
                    raise BadImage("changes its channels or its rate on the way")
                begin, stop = max(0, at), min(count, at + len(values))
                if stop > begin:
                    found[begin:stop] = values[begin - at : stop - at]
                    end = max(end, stop)
    return found[:end]
