"""Mutated files of every format of images, videos and sounds, decoded.

python tests/helpers/decoder_fuzz.py images|clips|sounds COUNT [SEED]   # how many were decoded, the slowest, the memory
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sound_files import encoded, tone
from videos import frame, write_video

SECONDS_EACH = 20.0  # of the processor: the machine may be busy


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


def image(data: bytes, draw: np.random.Generator) -> list[Any]:
    from ldm_vae.data.decoding import decode, read_size
    from ldm_vae.data.quarantine import BadImage

    with contextlib.suppress(BadImage):
        read_size(data)
    return [decode(data)]


# --- clips ------------------------------------------------------------------------------------------------------------

CONTAINERS = [
    ("mkv", "ffv1"), ("mp4", "libx264"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"), ("ts", "libx264"),
    ("flv", "libx264"), ("h264", "libx264"), ("mpg", "mpeg2video"),
]  # fmt: skip
ANIMATIONS = {"gif": "GIF", "webp": "WEBP", "apng": "PNG", "avif": "AVIF"}


def clip_seeds() -> dict[str, bytes]:
    """A valid file of every container, animated picture, and a frame of a folder of them."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for ending, codec in CONTAINERS:
            path = write_video(Path(folder) / f"a.{ending}", 9, codec=codec, options={"g": "4"})
            files[ending] = path.read_bytes()
    Image.init()  # which formats there are
    pictures = [Image.fromarray(frame(number)) for number in range(9)]
    for name, form in ANIMATIONS.items():
        if form in Image.SAVE_ALL:
            file = io.BytesIO()
            pictures[0].save(file, form, save_all=True, append_images=pictures[1:], duration=40)
            files[name] = file.getvalue()
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    files["frames"] = file.getvalue()
    return files


def clip(still: bytes, data: bytes, draw: np.random.Generator) -> list[Any]:
    """Frames of a clip of any length, rate and start; of a picture, those of a folder of others `still`."""
    from ldm_vae.data.clips import facts_of, frames_of
    from ldm_vae.data.decoding import Decoding
    from ldm_vae.data.footage import Video

    rate = None if draw.random() < 0.5 else float(draw.choice([1e-9, 0.1, 1.0, 24000 / 1001, 60.0, 1e9]))
    decoding = Decoding(
        frames=int(draw.choice([1, 2, 5, 9])), frame_rate=rate, frame_stride=int(draw.choice([1, 2, 7]))
    )
    start = None if draw.random() < 0.3 else float(draw.random())
    content: Any = data
    if data[1:4] == b"PNG" and b"acTL" not in data:
        folder = tempfile.mkdtemp()
        for number in range(4):
            path = Path(folder) / f"{number}.png"
            path.write_bytes(data if number == 2 else still)
        content = tuple(str(path) for path in sorted(Path(folder).iterdir()))
        decoding = replace(decoding, frame_rate=None)
    try:
        facts_of(Video(content), decoding)
        return [found.pixels for found in frames_of(Video(content), decoding, start)]
    finally:
        if isinstance(content, tuple):
            shutil.rmtree(Path(content[0]).parent)


# --- sounds -----------------------------------------------------------------------------------------------------------

SOUNDS = {
    "wav": ("WAV", "PCM_16"), "wav8": ("WAV", "PCM_U8"), "wav24": ("WAV", "PCM_24"), "wav64": ("WAV", "DOUBLE"),
    "extensible": ("WAVEX", "PCM_16"), "rf64": ("RF64", "PCM_16"), "w64": ("W64", "FLOAT"),
    "adpcm": ("WAV", "MS_ADPCM"), "gsm": ("WAV", "GSM610"), "flac": ("FLAC", "PCM_16"), "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"), "mp3": ("MP3", None), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "ULAW"),
    "caf": ("CAF", "ALAC_16"), "m4a": ("m4a", None),
}  # fmt: skip


def sound_seeds() -> dict[str, bytes]:
    """A valid file of every format, with one, two or six channels."""
    channels = {"gsm": 1, "wav8": 1, "extensible": 6}
    return {name: encoded(tone(6000, channels.get(name, 2)), form, subtype=subtype)
            for name, (form, subtype) in SOUNDS.items()}  # fmt: skip


def sound(data: bytes, draw: np.random.Generator) -> list[Any]:
    """An excerpt from anywhere, at another rate, of one channel."""
    from ldm_vae.data.decoding import Decoding
    from ldm_vae.data.sounds import crops_of

    decoding = Decoding(channels=1, sample_rate=int(draw.choice([8000, 8000, 44100, 7919])), samples=1024)
    (crop,), _ = crops_of(data, decoding, float(draw.random()))
    assert torch.isfinite(crop.pixels).all() and crop.pixels.shape == (1, 1024) and 0 < crop.box[3] <= 1024
    return [crop.pixels]


def fuzz(kind: str, count: int, seed: int) -> dict[str, float]:
    """Decodes `count` mutated files; what it raises is the failure."""
    from ldm_vae.data.quarantine import BadImage

    files = {"images": seeds, "clips": clip_seeds, "sounds": sound_seeds}[kind]()
    decode = {"images": image, "clips": partial(clip, files.get("frames", b"")), "sounds": sound}[kind]
    dtype, channels = (torch.float32, 1) if kind == "sounds" else (torch.uint8, 3)
    names = sorted(files)
    for name in names:
        with contextlib.suppress(BadImage if kind == "clips" else ()):  # of a drawn length that is too long
            assert decode(files[name], np.random.default_rng(0))[0].shape[0] == channels, name
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good, slowest = 0, 0.0
    for number in range(count):
        draw = np.random.default_rng([seed, number])
        name, other = names[number % len(names)], names[int(draw.integers(len(names)))]
        data = mutate(files[name], files[other], draw)
        frames, reason = [], "an image"
        start = time.process_time()
        try:
            frames = decode(data, draw)
        except BadImage as error:
            reason = error.reason.strip()
        slowest = max(slowest, time.process_time() - start)
        assert reason and "\n" not in reason, (name, number, reason)
        for pixels in frames:
            assert pixels.dtype == dtype and pixels.shape == frames[0].shape, (name, number)
            assert pixels.ndim == (2 if kind == "sounds" else 3) and pixels.shape[0] == channels, (name, number)
        good += bool(frames)
        assert slowest < SECONDS_EACH, f"{name} number {number} took {slowest:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"count": count, "good": good, "slowest_s": slowest, "memory": grown}


def main() -> None:
    faulthandler.enable()
    print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]), seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
