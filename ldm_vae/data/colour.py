"""Colour conversion: pictures of any mode become 1, 3 or 4 bands of 8 bits in sRGB.

ICC profiles are applied (a wide-gamut photograph read as sRGB looks washed out), alpha is composited on a stated
colour (dropping it shows what the artist hid), CMYK goes through its profile where it has one.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from ldm_vae.data.quarantine import BadImage

Background = tuple[int, int, int]
Convert = Callable[[Image.Image], Image.Image]

ROUNDING = 1  # levels by which a profile that is sRGB's own moves a colour
_GREYS = Image.frombytes("L", (256, 1), bytes(range(256)))
_LEVELS = range(0, 256, 15)
_PROBE = bytes(level for colour in itertools.product(_LEVELS, repeat=3) for level in colour)  # 18^3 colours
_BANDS = {1: "L", 3: "RGB", 4: "RGBA"}
_TRANSPARENT = {"LA", "PA", "La", "RGBA", "RGBa"}


def to_bands(image: Image.Image, channels: int, background: Background) -> Image.Image:
    """A loaded picture => mode L, RGB or RGBA (1, 3 or 4 channels), sRGB.

    Raises:
        BadImage: a picture file cannot give this number of channels.
    """
    if channels not in _BANDS:
        raise BadImage(f"a {image.mode} picture cannot give {channels} channels (use .npy files)")
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("L", "LA", "La"):
        # grey stays grey until its profile has been applied
        image = image.convert("LA") if image.mode == "La" or "transparency" in image.info else image
    elif image.mode in _TRANSPARENT or "transparency" in image.info:  # the latter: one colour of a PNG stands for it
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "LAB":
        image = _apply(image, _from_lab())
    image = _to_srgb(image)
    if image.mode == "LA":
        image = image.convert("RGBA")
    if image.mode == "RGBA" and channels != 4:
        image = _composite(image, background)
    return image if image.mode == _BANDS[channels] else image.convert(_BANDS[channels])


def grey_curve(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """[256], levels of grey in sRGB by a picture's profile; None where it changes nothing. For more than 8 bits, which
    Pillow does not hand to littleCMS."""
    profile = image.info.get("icc_profile")
    convert = _conversion(profile, "L") if profile else None
    if convert is None:
        return None
    curve: npt.NDArray[np.uint8] = np.asarray(convert(_GREYS).convert("L")).reshape(256)
    return curve


def _composite(image: Image.Image, background: Background) -> Image.Image:
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    colours = "L" if image.mode == "LA" else "RGB" if image.mode == "RGBA" else image.mode
    convert = _conversion(profile, colours)
    if convert is None:
        return image
    converted = convert(image.convert(colours))
    if image.mode.endswith("A"):
        converted.putalpha(image.getchannel("A"))
    return converted


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@lru_cache(maxsize=32)  # a dataset has few profiles; building a transform takes about 5 ms
def _conversion(profile: bytes, mode: str) -> Convert | None:
    """Conversion of pictures of a mode (L, RGB, CMYK) from `profile` to sRGB; grey stays grey.

    None where it changes nothing, or is broken or of another colour space: then the numbers are taken as sRGB, as every
    viewer does.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "L" and opened.profile.xcolor_space.strip() == "RGB":
            coloured = _conversion(profile, "RGB")  # equal parts of all three
            return None if coloured is None else lambda image: coloured(image.convert("RGB"))
        # of grey a table of 256 numbers, exact: littleCMS's own shortcut is up to 10 levels off in the shadows
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return lambda image: _apply(image, transform)
    # what it does decides, not what it is called: profiles with "sRGB" in their names are up to 73 levels from it
    probe = _GREYS if mode == "L" else Image.frombytes("RGB", (len(_PROBE) // 3, 1), _PROBE)
    before = np.asarray(probe.convert("RGB"), dtype=np.int16)
    after = np.asarray(_apply(probe, transform), dtype=np.int16)
    if int(np.abs(after - before).max()) <= ROUNDING:
        return None
    if mode == "L":
        return lambda image: image.point(after[0, :, 0].tolist())
    return lambda image: _apply(image, transform)


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # only in place it returns nothing
    return found
