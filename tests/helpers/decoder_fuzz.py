"""Mutated image files of every format, decoded.

python tests/helpers/decoder_fuzz.py COUNT [SEED]      # prints how many gave an image, the slowest, the memory
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

SECONDS_EACH = 10.0


def seeds() -> dict[str, bytes]:
    """A valid file of every format, and of the odd kinds of some."""
    from ldm_vae.data.decoding import FORMATS

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((80, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "png": (image, "PNG", {"exif": exif}),
        "png16": (Image.fromarray(draw.integers(0, 65536, (24, 40), dtype=np.uint16)), "PNG", {}),
        "apng": (image, "PNG", {"save_all": True, "append_images": [image.rotate(9)]}),
        "palette": (image.quantize(16), "PNG", {"transparency": 3}),
        "jpg": (image, "JPEG", {"exif": exif}),
        "progressive": (image, "JPEG", {"progressive": True}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}),
        "mpo": (image, "MPO", {"save_all": True, "append_images": [image]}),
        "webp": (image, "WEBP", {}),
        "webpl": (image.convert("RGBA"), "WEBP", {"lossless": True}),
        "gif": (image.quantize(16), "GIF", {"save_all": True, "append_images": [image.quantize(4)]}),
        "tiff": (image, "TIFF", {"compression": "tiff_lzw"}),
        "tiffj": (image, "TIFF", {"compression": "jpeg"}),
        "tiffd": (image.convert("CMYK"), "TIFF", {"compression": "tiff_deflate"}),
        "bmp": (image, "BMP", {}),
        "ppm": (image, "PPM", {}),
        "ico": (image, "ICO", {"sizes": [(16, 16), (32, 32)]}),
        "qoi": (image, "QOI", {}),
        "avif": (image, "AVIF", {}),
        "jp2": (image, "JPEG2000", {}),
    }
    files = {}
    for name, (picture, form, options) in kinds.items():
        if form in FORMATS and form in Image.SAVE:
            file = io.BytesIO()
            picture.save(file, form, **options)
            files[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, noise)
    files["npy"] = file.getvalue()
    return files


def mutate(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """One to three wounds: bits, a run of bytes, an extreme integer, a cut, a repetition, a graft."""
    out = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        # half of the wounds in the first bytes, where the headers are
        span = min(len(out), 64) if draw.random() < 0.5 else len(out)
        at = int(draw.integers(max(span, 1)))
        kind = int(draw.integers(7))
        if kind == 0:
            for place in draw.integers(0, max(len(out), 1), int(draw.integers(1, 8))):
                out[place : place + 1] = bytes([int(draw.integers(256))])
        elif kind == 1:
            out[at : at + int(draw.integers(1, 32))] = draw.bytes(int(draw.integers(1, 32)))
        elif kind == 2:
            extreme = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF][int(draw.integers(8))]
            width = int(draw.choice([1, 2, 4]))
            order = "big" if draw.random() < 0.5 else "little"
            out[at : at + width] = (extreme % 256**width).to_bytes(width, order)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + int(draw.integers(1, 64))]
        elif kind == 5:
            out[at:at] = out[at : at + int(draw.integers(1, 200))] * int(draw.integers(1, 20))
        else:
            out[at:] = other[int(draw.integers(len(other))) :]
    return bytes(out)


def fuzz(count: int, seed: int) -> dict[str, float]:
    """Decodes `count` mutated files; what it raises is the failure."""
    import torch

    from ldm_vae.data.decoding import decode, read_size
    from ldm_vae.data.quarantine import BadImage

    files = seeds()
    names = sorted(files)
    for name in names:
        assert decode(files[name]).shape[0] == 3, name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good, slowest = 0, 0.0
    for number in range(count):
        draw = np.random.default_rng([seed, number])
        name, other = names[number % len(names)], names[int(draw.integers(len(names)))]
        data = mutate(files[name], files[other], draw)
        pixels, reason = None, "an image"
        start = time.perf_counter()
        try:
            pixels = decode(data)
        except BadImage as error:
            reason = error.reason.strip()
        with contextlib.suppress(BadImage):
            read_size(data)
        slowest = max(slowest, time.perf_counter() - start)
        assert reason, (name, number)
        if pixels is not None:
            assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3, (name, number)
            good += 1
        assert slowest < SECONDS_EACH, f"{name} number {number} took {slowest:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"count": count, "good": good, "slowest_s": slowest, "memory": grown}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    faulthandler.enable()
    print(json.dumps(fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
