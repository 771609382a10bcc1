"""Sizes, colours and depths of picture files: one fact each, whatever the format says it by."""

from __future__ import annotations

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin

from ldm_vae.data.decoding import Decoding, decode, read_image, read_size
from ldm_vae.data.quarantine import BadImage

RAMP = np.full((20, 30, 3), 90, dtype=np.uint8)
RAMP[:, :, 0], RAMP[:, :, 1] = np.meshgrid(np.linspace(0, 255, 30), np.linspace(0, 255, 20))


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "MPO", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_the_header_is_that_of_the_pixels(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RAMP), form, exif=exif)
    found = read_image(data)
    assert read_size(data) == found.original_size == tuple(found.pixels.shape[1:])


# --- profiles ---------------------------------------------------------------------------------------------------------


def grey_profile(gamma: float) -> bytes:
    """An ICC profile (version 2) of grey with a power curve."""
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"sRGB\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags = {
        b"desc": name,
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)),
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head[:128] + struct.pack(">I", len(tags)) + table + body


def through(profile: bytes, grey: np.ndarray[Any, Any], **options: Any) -> np.ndarray[Any, Any]:
    return decode(saved(Image.fromarray(grey), "PNG", icc_profile=profile), **options).numpy()


@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_profiles_of_grey_are_applied(gamma: float) -> None:
    """Against sRGB's transfer function (IEC 61966-2-1); linear grey is far darker in numbers."""
    grey = np.tile(np.arange(256, dtype=np.uint8), (9, 1))
    light = (np.arange(256) / 255) ** gamma
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    for channels in (1, 3):
        assert np.abs(through(grey_profile(gamma), grey, channels=channels)[:, 4] - expected).max() < 2
    two = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.full_like(grey, 255))])
    assert np.abs(decode(saved(two, icc_profile=grey_profile(gamma))).numpy()[0, 4] - expected).max() < 2
    four = decode(saved(two, icc_profile=grey_profile(gamma)), channels=4).numpy()
    assert np.abs(four[0, 4] - expected).max() < 2 and (four[3] == 255).all()


@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_profiles_of_grey_of_16_bits_are_applied_before_the_bits_are_cut(gamma: float) -> None:
    grey = np.tile(np.arange(0, 65536, 64, dtype=np.uint16), (64, 1))
    light = (grey[0] / 65535) ** gamma
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    for file_format in ("PNG", "TIFF"):
        found = decode(saved(Image.fromarray(grey), file_format, icc_profile=grey_profile(gamma))).numpy()
        assert np.abs(found[:, 4] - expected).max() < 2.5
    assert len(np.unique(found)) > 200  # of linear grey cut to 8 bits first, 184 levels are left


def test_what_a_profile_does_decides_and_not_its_name() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {srgb[132 + 12 * at : 136 + 12 * at]: 136 + 12 * at for at in range(struct.unpack_from(">I", srgb, 128)[0])}
    data = bytearray(srgb)
    for one, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        data[tags[one] : tags[one] + 8] = srgb[tags[other] : tags[other] + 8]
    assert "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(bytes(data)))).lower()
    plain = decode(saved(Image.fromarray(RAMP)))
    swapped = decode(saved(Image.fromarray(RAMP), icc_profile=bytes(data)))
    assert (swapped.float() - plain).abs().max() > 70
    assert torch.equal(decode(saved(Image.fromarray(RAMP), icc_profile=srgb)), plain)
    # grey under a profile of colours: its numbers are equal parts of all three
    grey = np.ascontiguousarray(RAMP[:, :, 0])
    assert (through(srgb, grey)[0] == grey).all()


def test_long_texts_and_profiles_cost_no_image() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    texts.add_itxt("prompt", "y" * 3_000_000, zip=True)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    long = saved(Image.fromarray(RAMP), pnginfo=texts, icc_profile=srgb + bytes(3_000_000))
    assert torch.equal(decode(long), decode(saved(Image.fromarray(RAMP))))


# --- TIFF -------------------------------------------------------------------------------------------------------------


def tiff(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


BANDS = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
TIFFS: dict[str, tuple[bytes, int, np.ndarray[Any, Any]]] = {  # file, channels, what is to be read, [H, W, C]
    "five bands": (tiff(BANDS, photometric="minisblack", planarconfig="contig"), 5, BANDS),
    "five planes": (
        tiff(BANDS.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"), 5, BANDS,
    ),
    "colour in planes": (tiff(RAMP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), 3, RAMP),
    "float16": (tiff(RAMP[:, :, 0].astype(np.float16) / 256, photometric="minisblack"), 1,
                np.rint(RAMP[:, :, :1] / 256 * 255)),
    "white is zero, 8 bits": (tiff(255 - RAMP[:, :, 0], photometric="miniswhite"), 1, RAMP[:, :, :1]),
    "white is zero, 16 bits": (
        tiff(65535 - RAMP[:, :, 0].astype(np.uint16) * 257, photometric="miniswhite"), 1, RAMP[:, :, :1],
    ),
    "big": (tiff(BANDS, photometric="minisblack", planarconfig="contig", bigtiff=True, byteorder=">"), 5, BANDS),
}  # fmt: skip


@pytest.mark.parametrize("name", TIFFS)
def test_tiffs_are_read_as_what_they_say(name: str) -> None:
    data, channels, expected = TIFFS[name]
    pixels = decode(data, channels=channels)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert read_size(data, Decoding(channels=channels)) == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_arrays_in_tiffs_are_upright(orientation: int) -> None:
    plain = decode(TIFFS["five bands"][0], channels=5)
    turned = tiff(BANDS, photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, orientation, True)])
    expected = decode(saved(Image.fromarray(BANDS[:, :, :3]), "PNG", exif=exif_of(orientation)))
    assert torch.equal(decode(turned, channels=5)[:3], expected)
    assert plain.shape == (5, 20, 30)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_what_a_tiff_holds_is_said_and_never_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadImage, match="5 channels, expected 3"):
        decode(TIFFS["five bands"][0])
    wave = np.ones((8, 8), np.complex64)
    with pytest.raises(BadImage, match="complex float"):
        decode(tiff(wave, photometric="minisblack"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"30 x 20 pixels, 5 bands of 8 bits \(unsigned\): needs tifffile"):
        decode(TIFFS["five bands"][0], channels=5)


def test_a_bomb_is_named_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_vae.data.tiff.MOST", 2999)
    with pytest.raises(BadImage, match="the limit"):
        decode(TIFFS["five bands"][0], channels=5)


def test_lab_is_a_colour() -> None:
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(Image.fromarray(RAMP), lab)
    assert image is not None
    pixels = decode(saved(image, "TIFF")).permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - RAMP).mean() < 3
