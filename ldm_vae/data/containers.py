"""Containers: the frames of a video file by their time stamps, decoded by PyAV (FFmpeg; extra `video`).

A file is opened at the key frame before the first wanted frame, and left behind the last: an hour costs what its clip
costs. Playlists, which name other files and addresses, are no containers here; the first video stream is read, all
others are ignored. Frames of which FFmpeg had to invent parts are refused with all that refer to them.

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.core.errors import UsageError
from ldm_vae.core.validation import HEAD, disguise, first_line
from ldm_vae.data import colour
from ldm_vae.data.decoding import Decoded, Decoding, check_size, pixels_of
from ldm_vae.data.footage import Video, VideoFacts
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.ranges import FIELD

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,mxf,nut,ivf,obu,h264,hevc,yuv4mpegpipe,dv"
# a seek lands behind its target, or the packets' times are not those of frames: counted packet by packet instead
COUNTED = ("mpegts", "mpeg", "mpegvideo", "m4v", "flv", "h264", "hevc", "obu", "yuv4mpegpipe", "dv")
STEPS_BACK = (0, 2, 10)  # seconds by which a seek that landed too late is repeated, before all is read from the start
FAR = 2**40  # ticks: behind every end
HDR = {16: "PQ", 18: "HLG"}  # colour transfer, ISO/IEC 23091-2
UNNAMED, HIGH_DEFINITION = 2, 720  # of the colour matrix; from so many rows on it is usually BT.709


def facts(video: Video) -> VideoFacts:
    """Facts about a video: its first frame is decoded. Those of a file are remembered while it is not replaced.

    Raises:
        BadImage: it is none, or damaged at its beginning.
        UsageError: PyAV is not installed.
    """
    place = video.place
    return _facts(video) if place is None else _remembered(replace(video, start=None), place)


@lru_cache(maxsize=8192)
def _remembered(video: Video, _place: tuple[int, ...]) -> VideoFacts:
    return _facts(video)


def frames_at(video: Video, decoding: Decoding, times: Sequence[Fraction]) -> Iterator[Decoded]:
    """For each of `times` (ascending, seconds from the first frame) the last frame that is not after it.

    Frames are nominally 1 / rate apart; without `decoding.frame_rate` half of that is granted, so that stamps that
    jitter give every frame once; with it one tick of the clock, since stamps are rounded to it.

    Raises:
        BadImage: a frame is missing or damaged, or the stream ends before.
        UsageError: PyAV is not installed.
    """
    known = facts(video)
    for back in STEPS_BACK:
        if times[0] <= back:
            break
        with contextlib.suppress(_Late):
            yield from _chosen(video, known, decoding, times, times[0] - back)
            return
    yield from _chosen(video, known, decoding, times, None)


class _Late(Exception):
    """Raised when a seek landed behind the first wanted frame."""


class _Open:
    """An open container and its first video stream, one thread; `frames` are timed in ticks from its first frame."""

    def __init__(self, video: Video, rate: Fraction | None = None) -> None:
        try:
            import av
        except ImportError as error:
            raise UsageError("data: clips need PyAV: pip install 'ldm-vae[video]'") from error
        self.error: type[Exception] = av.error.FFmpegError
        self.file = video.open()
        try:
            self.container: Any = av.open(
                self.file, metadata_errors="ignore", container_options={"format_whitelist": FORMATS}
            )
        except Exception as error:
            self.file.seek(0)
            what = disguise(self.file.read(HEAD))
            self.file.close()
            raise BadImage(f"it {what}" if what else f"not a video that can be read: {_said(error)}") from error
        try:
            # without pictures beside a sound (the sleeve of a record)
            streams = [one for one in self.container.streams.video if "attached_pic" not in str(one.disposition)]
            if not streams:
                raise BadImage("holds no video stream")
            context: Any = streams[0].codec_context
            if context is None or not context.width:
                raise BadImage("its video stream names no codec and size that are known")
            check_size(context.height, context.width)
        except BadImage:
            self.__exit__()
            raise
        self.streams, self.stream = len(streams), streams[0]
        self.context = context
        # workers are the parallelism: threads of FFmpeg would fight them
        self.context.thread_count = 1
        self.tick = Fraction(self.stream.time_base or 1)
        stated = (rate, self.stream.average_rate, self.stream.guessed_rate, self.stream.base_rate)
        self.rate = next((Fraction(one) for one in stated if one), Fraction(25))
        self.step = max(1, round(1 / (self.rate * self.tick)))

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()
        self.file.close()

    def frames(self) -> Iterator[tuple[int, Any]]:
        """(ticks from the first frame of the stream, frame), in the order of display. Raises BadImage for damage."""
        start: int | None = self.stream.start_time
        last: int | None = None
        origin, shift, damage = 0, 0, ""
        try:
            for packet in self.container.demux(self.stream):
                frames = packet.decode()
                # what refers to an invented frame is wrong up to the next key frame, and does not say so
                if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                    damage = "FFmpeg had to invent parts"
                    break
                for frame in frames:
                    if last is None:
                        stamp = (start or 0) if frame.pts is None else int(frame.pts)
                        origin = stamp if start is None else start
                    elif frame.pts is None:  # raw streams have no stamps: frames follow each other
                        stamp = last + self.step
                    else:
                        # a clock that is set back goes on from where it was; one that stands still moves on
                        shift = last + self.step - frame.pts if frame.pts + shift <= last - self.step else shift
                        stamp = max(frame.pts + shift, last + 1)
                    last = stamp
                    yield stamp - origin, frame
        except self.error as error:
            damage = _said(error)
        if damage:
            behind = "its beginning" if last is None else f"{float((last - origin) * self.tick):.2f} s"
            raise BadImage(f"is cut off or damaged behind {behind}: {damage}")

    def count_at_the_end(self) -> int:
        """Frames of the stream by its last packets; 0 where these do not tell."""
        if set(self.container.format.name.split(",")) & set(COUNTED):
            return 0
        ends = [0]
        with contextlib.suppress(self.error):
            self.container.seek(FAR, stream=self.stream)
            origin = self.stream.start_time or 0
            for packet in self.container.demux(self.stream):
                if packet.size and packet.pts is not None and not packet.is_discard:
                    ends.append(packet.pts - origin + (packet.duration or self.step))
        return round(max(ends) * self.tick * self.rate)

    def count_all(self) -> int:
        """Frames of the stream by its packets, none decoded; at least 1."""
        count = 0
        with contextlib.suppress(self.error):
            for packet in self.container.demux(self.stream):
                count += bool(packet.size and not packet.is_discard)
        return max(1, count)


def _said(error: Exception) -> str:
    """FFmpeg's words without its number."""
    return str(getattr(error, "strerror", None) or first_line(error))[:120]


def _facts(video: Video) -> VideoFacts:
    with _Open(video) as opened:
        first = next((frame for _, frame in opened.frames()), None)
        if first is None:
            raise BadImage("holds no frame that can be decoded")
        height, width = (first.height, first.width) if first.rotation % 180 == 0 else (first.width, first.height)
        name = f"{opened.container.format.name.split(',')[0]}/{opened.context.name}"
        notes, mode = _notes(opened, first), first.format.name
        count, rate = opened.count_at_the_end(), opened.rate
    # no frame takes less than a byte: more of them are stamps that are wrong
    if not 0 < count <= video.bytes:
        # not every container that was read to some place can be read from its start again
        with _Open(video) as opened:
            count = opened.count_all()
    return VideoFacts(count, rate, height, width, name, mode, notes)


def _notes(opened: _Open, frame: Any) -> tuple[str, ...]:
    """Sentences about what is ignored of a file, or kept as it is though it should not be."""
    aspect = opened.stream.sample_aspect_ratio
    metadata = {name.lower(): value for name, value in opened.stream.metadata.items()}
    deep = max(component.bits for component in frame.format.components)
    unnamed = frame.colorspace == UNNAMED and frame.height >= HIGH_DEFINITION and not frame.format.is_rgb
    return tuple(
        note
        for said, note in (
            (opened.container.streams.audio, "audio, ignored"),
            (opened.streams > 1, "several video streams, the first is read"),
            (frame.interlaced_frame or opened.context.field_order > 1, "interlaced, and not deinterlaced"),
            (frame.color_trc in HDR, f"HDR ({HDR.get(frame.color_trc)}), and not tone-mapped"),
            (deep > 8, "more than 8 bits, kept as 8"),
            (aspect not in (None, 0, 1), "pixels that are not square, taken as they are"),
            (metadata.get("alpha_mode") == "1", "alpha of VP8 or VP9, ignored"),
            (unnamed, "no colour matrix named, BT.601 taken"),
        )
        if said
    )


def _chosen(
    video: Video, known: VideoFacts, decoding: Decoding, times: Sequence[Fraction], seek: Fraction | None
) -> Iterator[Decoded]:
    """The frames from a container opened at `seek` (None: from its start). Raises _Late before the first is yielded."""
    with _Open(video, known.rate) as opened:
        if seek is not None:
            try:
                origin = opened.stream.start_time or 0
                opened.container.seek(origin + int(seek / opened.tick), stream=opened.stream)
            except opened.error as error:
                raise _Late from error
        slack = opened.tick if decoding.frame_rate else 1 / known.rate / 2
        limits = [int((time + slack) / opened.tick) for time in times]
        ticks = [round(time / opened.tick) for time in times]
        frames = opened.frames()
        at, frame, decoded = 0, None, None
        coming = next(frames, None)
        if coming is None or (coming[0] > limits[0] and seek is not None):
            raise _Late if seek is not None else BadImage("holds no frame that can be decoded")
        for time, tick, limit in zip(times, ticks, limits, strict=True):
            # a frame within a tick of the time is its frame: the one behind it need not be decoded to know that
            while frame is None or (coming is not None and coming[0] <= limit):
                if coming is None:
                    raise BadImage("holds no frame that can be decoded")
                (at, frame), decoded = coming, None
                exact = abs(at - tick) <= 1
                coming = None if exact and limit == limits[-1] else next(frames, None)
                if coming is None:
                    break
            # the last frame stays for its own time and no longer
            if coming is None and at + opened.step + int(slack / opened.tick) < tick:
                raise BadImage(f"ends at {float((at + opened.step) * opened.tick):.2f} s, before {float(time):.2f} s")
            decoded = decoded or _decoded(frame, decoding, known)
            yield decoded


def _decoded(frame: Any, decoding: Decoding, known: VideoFacts) -> Decoded:
    """A frame of FFmpeg => uint8 [C, H, W] in full-range RGB by its own matrix and range, upright."""
    if decoding.value_range is not None:
        raise BadImage(f"a video holds no stored numbers that {FIELD} could map")
    height, width = frame.height, frame.width
    shown = frame.reformat(format="rgba", threads=1)
    plane = shown.planes[0]
    rows = np.frombuffer(plane, np.uint8)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # as Pillow lends its pictures: four bytes a pixel, of which the resize takes what it needs (transforms.py)
    pixels = torch.from_numpy(rows).as_strided((4, height, width), (1, plane.line_size, 4))
    if decoding.channels != 3 or has_alpha:
        array = pixels.permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(array if has_alpha else array[:, :, :3]))
        pixels = pixels_of(colour.to_bands(picture, decoding.channels, decoding.background))
    else:
        pixels = pixels[:3]
    if frame.rotation % 360:
        pixels = torch.rot90(pixels, frame.rotation // 90, (1, 2))
    found = (pixels.shape[1], pixels.shape[2])
    if found != (known.height, known.width):
        raise BadImage(f"changes its size from {known.height} x {known.width} to {found[0]} x {found[1]}")
    return Decoded(pixels, found, known.format, known.mode)
