"""Decoding: any image of a source becomes a uint8 tensor in one exact way, and every failure is one exception.

Decoded with Pillow, from a list of formats that excludes those that start programs (EPS). Never raises anything but
BadImage, whatever the bytes: tests/test_data_fuzz.py.

Legend: C channels, H W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ldm_vae.core.errors import UsageError
from ldm_vae.core.validation import HEAD, disguise
from ldm_vae.data import alpha, arrays, colour, depth, footage, tiff
from ldm_vae.data.arrays import Array
from ldm_vae.data.colour import Background
from ldm_vae.data.flags import Resize
from ldm_vae.data.footage import Video
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.ranges import Range, Values, check_range

__all__ = ["BadImage", "Decoded", "Decoding", "RawImage", "decode", "read_image"]

RawImage = bytes | Array | Image.Image | Video

WHITE: Background = (255, 255, 255)
MAX_PIXELS = 178_956_970  # where Pillow calls an image a bomb: 512 MiB of RGB
MAX_ASPECT = 32  # a strip of 32:1 cannot be cropped sensibly, and resizing 1 x 10^6 by its short side is a bomb

_UPRIGHT = {  # EXIF orientation => what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()
# unpacked text and colour profiles of a PNG: from 1 MB on Pillow would give up the image
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
EXTENSIONS = frozenset(
    {extension.lower() for extension, name in Image.EXTENSION.items() if name in FORMATS} | {".jfif", ".npy"}
)


@dataclass(frozen=True)
class Decoding:
    """Settings of the way from bytes to pixels and to a crop of the resolution; part of a store's preprocessing
    identity."""

    channels: int = 3
    background: Background = WHITE
    value_range: Range | None = None
    jpeg_draft: bool = False
    resize: Resize = "short_side"
    """Of whole images (training's crops follow `transform`): see TransformConfig.resize."""
    alpha: bool = False
    """The fourth of four channels is straight alpha (alpha.py), and no further channel of any meaning."""
    frames: int | None = None
    """Frames of a clip; None: images, and videos are none."""
    frame_rate: float | None = None
    """Frames a second to which a video is resampled; None: its own."""
    frame_stride: int = 1
    """Every so many frames at that rate."""
    sample_rate: int | None = None
    """Samples a second of sounds; None: images or clips, and sounds are none."""
    samples: int | None = None
    """Samples of an excerpt of a sound; None: whole sounds."""

    def __post_init__(self) -> None:
        check_range(self.value_range)
        if self.frames is None and (self.frame_rate is not None or self.frame_stride != 1):
            raise UsageError("frames: expected the number of frames of a clip beside frame_rate and frame_stride")
        if self.frames is not None and self.jpeg_draft:
            raise UsageError("jpeg_draft: is for images alone, expected false with frames")
        if self.samples is not None and self.sample_rate is None:
            raise UsageError("samples: expected the sample_rate of sounds beside it")
        if self.sample_rate is not None and (self.frames is not None or self.jpeg_draft or self.value_range):
            raise UsageError("sample_rate: is of sounds, expected no frames, jpeg_draft and value_range")
        if self.alpha and self.channels != alpha.CHANNELS:
            raise UsageError(f"alpha: expected channels 4 (red, green, blue, alpha), got {self.channels}")

    @property
    def signal(self) -> Literal["image", "video", "audio"]:
        """Kind of a sample."""
        if self.sample_rate is not None:
            return "audio"
        return "image" if self.frames is None else "video"


DEFAULT = Decoding()


def endings_of(decoding: Decoding) -> frozenset[str]:
    """Endings of the files that are read so: those of videos too where clips are; of sounds, and of videos that have
    one."""
    if decoding.signal == "audio":
        return footage.SOUNDS | footage.EXTENSIONS
    return EXTENSIONS if decoding.frames is None else EXTENSIONS | footage.EXTENSIONS


@dataclass(frozen=True)
class Decoded:
    """A decoded image: pixels uint8 [C, H, W] (of sounds float32 [C, L]); size (H, W) of the image upright, before
    jpeg_draft made it smaller; the file format (as Pillow calls it, NPY, or array) and the mode it had; the values it
    was made of, None for 8 bits taken as they are."""

    pixels: torch.Tensor
    original_size: tuple[int, int]
    format: str
    mode: str
    made_of: Values | None = None

    @property
    def values(self) -> Values:
        """The values it was made of; of 8 bits taken as they are they are looked up in the pixels."""
        if self.made_of is not None:
            return self.made_of
        colours = self.pixels[:3]  # alpha is none
        return Values(int(colours.min()), int(colours.max()), 0, 255)


def decode(
    image: RawImage,
    *,
    channels: int = 3,
    background: Background = WHITE,
    value_range: Range | None = None,
) -> torch.Tensor:
    """An image in any form => uint8 [C, H, W] in sRGB, upright by its EXIF orientation, first frame if it is animated.

    Args:
        image: the bytes of a file, an array (see `arrays.from_array`) or a Pillow image.
        channels: 1 (grey), 3 (RGB), 4 (RGBA); any number for arrays and .npy files.
        background: what is seen through transparent pixels, unless channels is 4.
        value_range: the values that become 0 and 255, of arrays and of files; by default those of the number type
            (ranges.py).

    Raises:
        BadImage: the image cannot be decoded, or its numbers have no range; `.reason` says why.
        UsageError: a value_range without a width.
    """
    return read_image(image, Decoding(channels, background, value_range)).pixels


def read_image(image: RawImage, decoding: Decoding = DEFAULT, at_least: int | None = None) -> Decoded:
    """Decode as `decode` does, and return what is known about the image with it.

    Args:
        at_least: with `decoding.jpeg_draft`, the short side that is enough: a JPEG is decoded at 1/2, 1/4 or 1/8 of
            its size where that is no smaller. Faster, and not the same pixels.

    Raises:
        BadImage: the image cannot be decoded.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns about odd metadata; torch about the read-only view
            warnings.simplefilter("ignore")
            found = _read(image, decoding, at_least if decoding.jpeg_draft else None)
            return replace(found, pixels=alpha.without_hidden(found.pixels)) if decoding.alpha else found
    except BadImage:
        raise
    except Exception as error:  # format plugins raise anything on hostile bytes: struct.error, KeyError, ...
        raise bad_image(error) from error


def read_size(image: RawImage, decoding: Decoding = DEFAULT) -> tuple[int, int]:
    """(H, W) of an image, upright, from its header alone (arrays are read). Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # arrays have no header that Pillow reads
            if isinstance(image, np.ndarray) or (isinstance(image, bytes) and _array(image) is not None):
                return read_image(image, decoding).original_size
            # only the header is parsed: nothing is decompressed for a size
            if isinstance(image, Video):
                raise BadImage("a video; `frames` reads clips")
            picture = _open(image)
            width, height = picture.size
            tags: Any = getattr(picture, "tag_v2", None)  # of a TIFF
            if tags is not None and (width, height) != (tags[256], tags[257]):  # Pillow has exchanged them already
                return height, width
            return (width, height) if _orientation(picture) >= 5 else (height, width)
    except BadImage:
        raise
    except Exception as error:
        raise bad_image(error) from error


def bad_image(error: Exception) -> BadImage:
    """The reason in an error of a decoder."""
    if isinstance(error, MemoryError):
        return BadImage("needs more memory than there is")
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels: a decompression bomb")
    message = str(error).strip() or type(error).__name__
    return BadImage(message.splitlines()[0][:200])


def _read(image: RawImage, decoding: Decoding, at_least: int | None) -> Decoded:
    if isinstance(image, np.ndarray):
        return _from_array(image, decoding, "array")
    if isinstance(image, Video):
        raise BadImage("a video; `frames` reads clips")
    if isinstance(image, bytes) and (found := _array(image)) is not None:
        name, load = found
        return _from_array(load(image), decoding, name)
    picture = _open(image)
    name, mode, (width, height) = picture.format or "array", picture.mode, picture.size
    stored = depth.stored(picture)  # known until it is loaded
    # before `load`: the draft chooses the scale at which libjpeg decodes
    if at_least is not None and name == "JPEG":
        shrink = at_least / min(width, height)
        picture.draft(None, (max(1, round(width * shrink)), max(1, round(height * shrink))))
    picture.load()
    # after `load`: some formats hold their EXIF data behind the pixels
    orientation = _orientation(picture)
    if orientation in _UPRIGHT:
        info = picture.info
        picture = picture.transpose(_UPRIGHT[orientation])
        picture.info = info  # transpose drops the palette's transparency and the colour profile
    # those that exchange rows and columns
    if orientation >= 5:
        width, height = height, width
    made_of: Values | None = None
    # more than 8 bits: mapped by their range, as arrays are, since Pillow would clip them
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        array, own = depth.numbers(picture, stored)
        curve = colour.grey_curve(picture)
        limits = decoding.value_range or own
        pixels, made_of = arrays.from_array(array, decoding.channels, limits, curve, decoding.alpha)
    else:
        if decoding.value_range is not None:
            picture, made_of = depth.stretched(picture, stored, decoding.value_range)
        pixels = pixels_of(colour.to_bands(picture, decoding.channels, decoding.background))
    return Decoded(pixels, (height, width), name, mode, made_of)


def _array(data: bytes) -> tuple[str, Callable[[bytes], Array]] | None:
    """The name of a format whose files are arrays, and its reader; None for pictures."""
    if data.startswith(arrays.MAGIC):
        return "NPY", arrays.load_npy
    return ("TIFF", tiff.load) if tiff.is_foreign(data) else None


def _open(image: bytes | Image.Image) -> Image.Image:
    if isinstance(image, bytes):
        if not image:
            raise BadImage("the file is empty")
        # kept for the sentence: `image` becomes the picture
        head = image[:HEAD]
        try:
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        except UnidentifiedImageError as error:
            what = disguise(head)
            told = f"it {what}" if what else "not an image of a known format, or damaged at its beginning"
            raise BadImage(told) from error
    check_size(image.height, image.width)
    return image


def check_size(height: int, width: int) -> None:
    """Raise BadImage for a picture that is too large, or a strip."""
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, the limit is {MAX_PIXELS / 1e6:.0f} million")
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise BadImage(f"{width} x {height} pixels: longer than {MAX_ASPECT} times its width")


def _orientation(picture: Image.Image) -> int:
    """1 to 8; 1 where the EXIF data are absent or broken."""
    try:
        orientation = int(picture.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block is no reason to lose the image
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _from_array(array: Array, decoding: Decoding, name: str) -> Decoded:
    pixels, values = arrays.from_array(array, decoding.channels, decoding.value_range, alpha=decoding.alpha)
    check_size(pixels.shape[1], pixels.shape[2])
    return Decoded(pixels, (pixels.shape[1], pixels.shape[2]), name, str(array.dtype), values)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """A loaded L, RGB or RGBA picture => uint8 [C, H, W].

    Pillow keeps RGB in four bytes a pixel; its arrow interface lends them without a copy (np.asarray takes a fifth of
    a decode), and torch resizes four channels faster than three. Images above 16 MB lie in several blocks: copied.
    """
    channels = len(picture.getbands())
    if channels > 1:
        try:
            flat = pa.array(picture).values.to_numpy(zero_copy_only=True)
            return torch.from_numpy(flat.reshape(picture.height, picture.width, 4)).permute(2, 0, 1)[:channels]
        except (ValueError, TypeError, pa.ArrowInvalid):
            pass
    array = np.array(picture)
    return torch.from_numpy(array.reshape(picture.height, picture.width, channels)).permute(2, 0, 1)
