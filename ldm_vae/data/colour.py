"""Colour conversion: pictures of any mode become 1, 3 or 4 bands of 8 bits in sRGB.

ICC profiles are applied (a wide-gamut photograph read as sRGB looks washed out), alpha is composited on a stated
colour (dropping it shows what the artist hid), CMYK goes through its profile where it has one.
"""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageCms

from ldm_vae.data.quarantine import BadImage

Background = tuple[int, int, int]

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
    elif image.mode in _TRANSPARENT or "transparency" in image.info:  # the latter: one colour of a PNG stands for it
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    image = _to_srgb(image)
    if image.mode == "RGBA" and channels != 4:
        image = _composite(image, background)
    return image if image.mode == _BANDS[channels] else image.convert(_BANDS[channels])


def _composite(image: Image.Image, background: Background) -> Image.Image:
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=32)  # a dataset has few profiles; building a transform takes about 5 ms
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transformation from `profile` to sRGB; None where it is sRGB already, or broken or of another colour space (then
    the numbers are taken as sRGB, as every viewer does)."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(opened).lower() and mode != "CMYK":
            return None
        out = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, out)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
