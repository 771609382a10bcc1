"""Clips: T frames of a video at a frame rate, from any of its forms; an image is a clip of one frame.

The law of time: frame j of a clip that starts at s is the last frame of the video that is not after
s + j * stride / rate, where rate is `frame_rate`, or the video's own (then every frame comes once). A video of constant
rate, of varying rate, and one with gaps obey it alike: what is missing is the frame before it, held.

Legend: C channels, T frames of a clip, H W pixels.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ldm_vae.core.errors import UsageError
from ldm_vae.data import containers, sounds
from ldm_vae.data.decoding import FORMATS, Decoded, Decoding, RawImage, bad_image, check_size, read_image, read_size
from ldm_vae.data.files import read_bytes
from ldm_vae.data.footage import Video, VideoFacts
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.transforms import Crop

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # the other formats of several pictures hold pages, not frames
MOST_ANIMATED = 2**30  # pixels of all frames: seconds, where a few bytes can stand for hours
STILL_MS = 100  # of a frame that states none, as browsers show it
STILL = Fraction(1)


class TooShort(BadImage):
    """Raised for a video that has fewer frames than a clip."""


View = Callable[[torch.Tensor, tuple[int, int]], tuple[Crop, ...]]


def crops_of(
    image: RawImage, decoding: Decoding, view: View, *, at_least: int | None = None, draw: float | None = None
) -> tuple[tuple[Crop, ...], Decoded]:
    """The crops of an image [C, H, W], or of a clip [C, T, H, W] whose frames are cut alike; and the first frame whole.
    The one excerpt of a sound [C, L], which no view cuts; and the same.

    Args:
        view: (frame uint8 [C, H, W], original size) => its crops.
        at_least: see `read_image`.
        draw: from 0 to 1, where among the frames that a clip can start at it starts; None: where the video says.

    Raises:
        BadImage: it cannot be decoded, or is shorter than the clip.
    """
    if decoding.signal == "audio":
        return sounds.crops_of(image, decoding, draw)
    if decoding.frames is None:
        found = read_image(image, decoding, at_least)
        return view(found.pixels, found.original_size), found
    # one frame at a time: whole ones of a long clip are not held
    first, cut = None, []
    for frame in frames_of(image, decoding, draw):
        first = first or frame
        cut.append(view(frame.pixels, frame.original_size))
    assert first is not None
    return tuple(
        replace(crops[0], pixels=torch.stack([crop.pixels for crop in crops], dim=1))
        for crops in zip(*cut, strict=True)
    ), first


def frames_of(image: RawImage, decoding: Decoding, draw: float | None = None) -> Iterator[Decoded]:
    """The frames of one clip, in order: `decoding.frames` of a video, one of an image.

    Raises:
        BadImage: it cannot be decoded, or is shorter than the clip.
    """
    with _as_bad_image():
        animation = _animation(image)
        appear = [] if animation is None else _times(animation)
        known = facts_of(image, decoding) if animation is None else _facts_of_animation(animation, appear)
        if known.frames == 1:
            times = [Fraction(0)]
        else:
            start = _start(image, known, decoding, draw)
            times = [start + number * step_of(known, decoding) for number in range(decoding.frames or 1)]
        if isinstance(image, Video) and isinstance(image.content, tuple):
            yield from _of_files(image.content, decoding, times, known)
        elif animation is not None:
            yield from _of_animation(animation, decoding, times, appear[:-1])
        elif (video := _container(image)) is not None:
            yield from containers.frames_at(video, decoding, times)
        else:
            yield read_image(image, decoding)


def first_frame(image: RawImage, decoding: Decoding, at_least: int | None = None) -> Decoded:
    """An image, of at least so many pixels a side where it is reduced, or a clip's first frame. Raises BadImage."""
    if decoding.frames is None:
        return read_image(image, decoding, at_least)
    return next(frames_of(image, replace(decoding, frames=1)))


def facts_of(image: RawImage, decoding: Decoding) -> VideoFacts:
    """Facts about a video, or about an image as a clip of one frame. Raises BadImage."""
    with _as_bad_image():
        if isinstance(image, Video) and isinstance(image.content, tuple):
            return _facts_of_files(image.content, decoding)
        if (animation := _animation(image)) is not None:
            return _facts_of_animation(animation, _times(animation))
        if (video := _container(image)) is not None:
            return containers.facts(video)
        height, width = read_size(image, decoding)
        return VideoFacts(1, STILL, height, width, "", "")


def step_of(known: VideoFacts, decoding: Decoding) -> Fraction:
    """Seconds between two frames of a clip."""
    rate = known.rate if decoding.frame_rate is None else Fraction(decoding.frame_rate).limit_denominator(10**6)
    return decoding.frame_stride / rate


def reach(known: VideoFacts, decoding: Decoding) -> int:
    """Frames that the longest clip of a video has: 1 of an image."""
    last = (known.frames - 1) / known.rate
    return int(last / step_of(known, decoding)) + 1


def tiles_of(known: VideoFacts, decoding: Decoding) -> tuple[int, Fraction]:
    """Clips that cover a video one after the other, and the seconds from one to the next; one of a video that is too
    short, which says so when it is read."""
    if known.frames == 1 or decoding.frames is None:
        return 1, Fraction(0)
    return max(1, reach(known, decoding) // decoding.frames), decoding.frames * step_of(known, decoding)


def _start(image: RawImage, known: VideoFacts, decoding: Decoding, draw: float | None) -> Fraction:
    """Raises BadImage for a video that is too short."""
    assert decoding.frames is not None
    if (there := reach(known, decoding)) < decoding.frames:
        at = f" at {decoding.frame_rate:g}/s" if decoding.frame_rate else ""
        every = f", every {decoding.frame_stride}th" if decoding.frame_stride > 1 else ""
        raise TooShort(
            f"{known.frames} frames in {known.seconds:.2f} s: {there} of the {decoding.frames} of a clip{at}{every}"
        )
    if draw is None:
        return (image.start if isinstance(image, Video) else None) or Fraction(0)
    # each of the video's own frames that leaves room behind it is equally likely
    room = (known.frames - 1) / known.rate - (decoding.frames - 1) * step_of(known, decoding)
    return Fraction(int(draw * (math.floor(room * known.rate) + 1))) / known.rate


@contextlib.contextmanager
def _as_bad_image() -> Iterator[None]:
    """Whatever goes wrong inside is a BadImage, unless the call was wrong."""
    try:
        yield
    except (BadImage, UsageError):
        raise
    except Exception as error:  # FFmpeg's, Pillow's, of any kind
        raise bad_image(error) from error


def _open_picture(image: bytes, formats: tuple[str, ...]) -> Any:
    """A picture of Pillow's, of which nothing but the header is read; None of anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(image), formats=formats)
        except UnidentifiedImageError:
            return None


# --- animated images: Pillow's, whose colours and alpha are those of its images ---------------------------------------


def _animation(image: RawImage) -> Any:
    """An open picture of more than one frame; None of anything else. Raises BadImage for one that is too large."""
    if isinstance(image, Video) and isinstance(image.content, bytes):
        image = image.content
    if not isinstance(image, bytes):
        return None
    picture = _open_picture(image, tuple(name for name in ANIMATIONS if name in FORMATS))
    if (count := getattr(picture, "n_frames", 1)) == 1:
        return None
    check_size(picture.height, picture.width)
    # every frame is composed for the times alone: nothing can be passed over, as in a container
    if count * picture.height * picture.width > MOST_ANIMATED:
        raise BadImage(
            f"{count:,} frames of {picture.width} x {picture.height} pixels, the limit of an animated picture is "
            f"{MOST_ANIMATED / 1e9:.1f} billion in all"
        )
    return picture


def _times(animation: Any) -> list[Fraction]:
    """Seconds at which each frame appears, and the end of the last."""
    times = [Fraction(0)]
    for number in range(animation.n_frames):
        animation.seek(number)
        # WebP and AVIF tell it with the pixels
        animation.load()
        times.append(times[-1] + Fraction(animation.info.get("duration") or STILL_MS) / 1000)
    return times


def _facts_of_animation(animation: Any, appear: Sequence[Fraction]) -> VideoFacts:
    count, size = len(appear) - 1, (animation.height, animation.width)
    return VideoFacts(count, count / appear[-1], *size, str(animation.format), animation.mode)


def _of_animation(
    animation: Any, decoding: Decoding, times: Sequence[Fraction], appear: Sequence[Fraction]
) -> Iterator[Decoded]:
    slack = Fraction(1, 1000) if decoding.frame_rate else (appear[-1] / max(1, len(appear) - 1)) / 2
    for time in times:
        number = max(at for at, shown in enumerate(appear) if shown <= time + slack)
        animation.seek(number)
        animation.load()
        frame = animation.copy()
        yield replace(read_image(frame, decoding), format=str(animation.format))


# --- folders of frames ------------------------------------------------------------------------------------------------


def _facts_of_files(paths: Sequence[str], decoding: Decoding) -> VideoFacts:
    numbers = [frame_number(path) for path in paths]
    gaps = sorted({later - earlier for earlier, later in itertools.pairwise(numbers)})
    # frames may be numbered in steps, by all alike
    if len(gaps) > 1:
        missing = next(one for one, other in itertools.pairwise(numbers) if other - one == gaps[-1])
        raise BadImage(f"frame {missing + gaps[0]} is missing, or its number is written twice ({paths[0]})")
    height, width = read_size(read_bytes(paths[0]), decoding)
    return VideoFacts(len(paths), STILL, height, width, "frames", PurePath(paths[0]).suffix[1:].lower())


def frame_number(path: str) -> int:
    """The number in a frame's name, the last one; -1 of a name without."""
    numbers: list[str] = re.findall(r"\d+", PurePath(path).stem)
    return int(numbers[-1]) if numbers else -1


def _of_files(
    paths: Sequence[str], decoding: Decoding, times: Sequence[Fraction], known: VideoFacts
) -> Iterator[Decoded]:
    for time in times:
        found = read_image(read_bytes(paths[int(time)]), decoding)
        if found.original_size != (known.height, known.width):
            raise BadImage(
                f"changes its size from {known.height} x {known.width} to {found.original_size[0]} x "
                f"{found.original_size[1]} ({PurePath(paths[int(time)]).name})"
            )
        yield replace(found, format="frames")


def _container(image: RawImage) -> Video | None:
    """The file of a video that is no picture of Pillow's; None of arrays and pictures."""
    if isinstance(image, Video):
        return None if isinstance(image.content, tuple) else image
    if not isinstance(image, bytes) or image.startswith(b"\x93NUMPY"):
        return None
    return Video(image) if _open_picture(image, FORMATS) is None else None
