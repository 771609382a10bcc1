"""Decoding: orientation, colour, depth, alpha, arrays; every kind of damage becomes a BadImage with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ldm_vae.data.decoding import Decoding, decode, read_image, read_size
from ldm_vae.data.quarantine import BadImage

ROWS, COLUMNS = np.arange(20)[:, None], np.arange(30)
RAMP = np.stack([5 * ROWS + 3 * COLUMNS, 90 + 0 * (ROWS + COLUMNS), ROWS + COLUMNS], axis=2).astype(np.uint8)


def saved(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def hwc(pixels: torch.Tensor) -> np.ndarray:
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy()


# --- what a picture can be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "QOI", "JPEG2000"])
def test_lossless_formats_are_exact(name: str) -> None:
    image = Image.fromarray(RAMP)
    if name == "GIF":
        image = image.quantize(64)
    expected = np.array(image.convert("RGB"))
    data = saved(image, name, **({"lossless": True} if name == "WEBP" else {}))
    decoded = read_image(data)
    assert (hwc(decoded.pixels) == expected).all()
    assert decoded.original_size == read_size(data) == (20, 30)
    assert decoded.format == name


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_pillows(options: dict[str, object]) -> None:
    data = saved(Image.fromarray(RAMP), "JPEG", quality=80, **options)
    assert (hwc(decode(data)) == np.array(Image.open(io.BytesIO(data)))).all()


def test_avif_where_pillow_has_it() -> None:
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow cannot write AVIF")
    pixels = hwc(decode(saved(Image.fromarray(RAMP), "AVIF", quality=95)))
    assert np.abs(pixels.astype(int) - RAMP).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.fromarray(RAMP)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation => Pillow's transposition that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, "PNG", exif=exif)
    assert (hwc(decode(data)) == RAMP).all()
    assert read_size(data) == read_image(data).original_size == (20, 30)


def test_broken_exif_is_ignored() -> None:
    data = saved(Image.fromarray(RAMP), "JPEG", exif=b"Exif\0\0MM\0*garbage that is no directory")
    assert decode(data).shape == (3, 20, 30)


def test_icc_profiles_are_applied() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    same = saved(Image.fromarray(RAMP), "PNG", icc_profile=lab.tobytes())
    assert (hwc(decode(same)) == RAMP).all()  # sRGB says nothing new
    wide = saved(Image.fromarray(RAMP), "PNG", icc_profile=swapped_profile(lab.tobytes()))
    pixels = hwc(decode(wide))
    assert np.abs(pixels.astype(int) - RAMP).mean() > 20
    with_alpha = Image.fromarray(RAMP).convert("RGBA")
    assert (hwc(decode(saved(with_alpha, "PNG", icc_profile=swapped_profile(lab.tobytes())))) == pixels).all()
    broken = saved(Image.fromarray(RAMP), "PNG", icc_profile=b"no profile at all")
    assert (hwc(decode(broken)) == RAMP).all()


def swapped_profile(srgb: bytes) -> bytes:
    """sRGB with the colorants of red and blue exchanged, under another name: a wide gamut, only more so."""
    data = bytearray(srgb)
    count = struct.unpack_from(">I", data, 128)[0]
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, blue = bytes(data[tags[b"rXYZ"] : tags[b"rXYZ"] + 8]), bytes(data[tags[b"bXYZ"] : tags[b"bXYZ"] + 8])
    data[tags[b"rXYZ"] : tags[b"rXYZ"] + 8], data[tags[b"bXYZ"] : tags[b"bXYZ"] + 8] = blue, red
    return bytes(data).replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be")).replace(b"sRGB", b"oRGB")


def test_cmyk_and_adobes_inverted_cmyk() -> None:
    image = Image.fromarray(RAMP)
    cmyk = image.convert("CMYK")
    for data in (saved(cmyk, "TIFF"), saved(cmyk, "JPEG", quality=100, subsampling=0)):  # Pillow's JPEG has the marker
        assert np.abs(hwc(decode(data)).astype(int) - RAMP).mean() < 6
    assert b"Adobe" in saved(cmyk, "JPEG")


def test_sixteen_bits_keep_their_upper_eight() -> None:
    deep = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    for name in ("PNG", "TIFF"):
        pixels = hwc(decode(saved(Image.fromarray(deep), name)))
        assert (pixels == expected[:, :, None]).all()
    assert (decode(saved(Image.fromarray(deep)), channels=1).numpy()[0] == expected).all()


def png_of(depth: int, colour: int, rows: list[bytes], width: int) -> bytes:
    """A PNG that Pillow itself does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_sixteen_bit_colour() -> None:
    deep = (RAMP.astype(np.uint16) * 257).astype(">u2")
    data = png_of(16, 2, [row.tobytes() for row in deep], 30)
    assert (hwc(decode(data)) == RAMP).all()


def test_palette_grey_and_one_bit() -> None:
    palette = Image.fromarray(RAMP).quantize(16)
    assert (hwc(decode(saved(palette))) == np.array(palette.convert("RGB"))).all()
    grey = Image.fromarray(RAMP[:, :, 0])
    assert (hwc(decode(saved(grey))) == RAMP[:, :, :1]).all()
    assert decode(saved(grey), channels=1).shape == (1, 20, 30)
    bits = Image.fromarray(RAMP[:, :, 0] > 60)
    assert set(np.unique(hwc(decode(saved(bits))))) == {0, 255}
    one = decode(saved(Image.fromarray(RAMP)), channels=1)
    assert (one.numpy()[0] == np.array(Image.fromarray(RAMP).convert("L"))).all()


def test_alpha_is_composited_on_a_stated_colour() -> None:
    rgba = np.concatenate([RAMP, np.zeros((20, 30, 1), np.uint8)], axis=2)
    rgba[:10, :, 3] = 255
    for name in ("PNG", "WEBP", "TIFF"):
        data = saved(Image.fromarray(rgba), name, **({"lossless": True, "exact": True} if name == "WEBP" else {}))
        pixels = hwc(decode(data))
        assert (pixels[:10] == RAMP[:10]).all()
        assert (pixels[10:] == 255).all()
        assert (hwc(decode(data, background=(1, 2, 3)))[10:] == (1, 2, 3)).all()
        assert (hwc(decode(data, channels=4)) == rgba).all()
    assert decode(saved(Image.fromarray(RAMP)), channels=4)[3].eq(255).all()


def test_transparency_of_palettes_and_single_colours() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = hwc(decode(saved(palette, transparency=0), background=(9, 9, 9)))
    assert pixels.tolist() == [[[9, 9, 9], [40, 50, 60]]]
    pair = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert hwc(decode(saved(pair, transparency=(1, 2, 3)))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 2), 7), Image.new("L", (2, 2), 0)])
    assert (hwc(decode(saved(grey_alpha), background=(0, 0, 255))) == (0, 0, 255)).all()


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        data = saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert (hwc(decode(data)) == (255, 0, 0)).all(), name


def test_a_rotated_palette_keeps_its_transparency() -> None:
    palette = Image.new("P", (3, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(palette, transparency=0, exif=exif)
    assert (hwc(decode(data, background=(5, 6, 7))) == (5, 6, 7)).all()
    assert decode(data).shape == (3, 3, 2)


def test_large_images_in_several_memory_blocks() -> None:
    large = Image.linear_gradient("L").resize((2600, 2400)).convert("RGB")  # 25 MB as Pillow keeps it
    assert (hwc(decode(large)) == np.array(large)).all()


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_arrays_of_any_number_of_channels(channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 13, channels), dtype=np.uint8)
    for form in (npy(array), npy(np.moveaxis(array, 2, 0)), array):
        assert (hwc(decode(form, channels=channels)) == array).all()
    assert read_size(npy(array), Decoding(channels)) == (9, 13)


def test_number_types_and_ranges() -> None:
    values = np.array([[0.0, 0.5, 1.0]])
    assert decode(npy(values), channels=1).flatten().tolist() == [0, 128, 255]
    assert decode(npy(values > 0.2), channels=1).flatten().tolist() == [0, 255, 255]
    assert decode(npy((values * 65535).astype(np.uint16)), channels=1).flatten().tolist() == [0, 127, 255]
    hounsfield = np.array([[-2000, -1000, 0, 1000]], dtype=np.int16)
    assert decode(npy(hounsfield), channels=1, value_range=(-1000, 1000)).flatten().tolist() == [0, 0, 128, 255]
    assert decode(values.astype(np.float32), channels=3).shape == (3, 1, 3)
    tiff = saved(Image.fromarray(values.astype(np.float32)), "TIFF")
    assert decode(tiff, channels=1).flatten().tolist() == [0, 128, 255]
    luma = decode(npy(RAMP), channels=1).numpy()[0].astype(int)
    assert np.abs(luma - np.array(Image.fromarray(RAMP).convert("L"))).max() <= 1


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[np.nan, 1.0]]), "NaN or Inf"),
        (np.array([[0.0, 255.0]]), r"span \[0, 255\]: set data.value_range"),
        (np.array([[-5, 3]], dtype=np.int16), "set data.value_range"),
        (np.array([[1j]]), "not pixels"),
        (np.array([["a"]]), "not pixels"),
        (np.zeros((9, 9, 7), np.uint8), "has 7 channels, expected 3"),
        (np.zeros(5, np.uint8), "is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "is not an image"),
        (np.zeros((2, 3, 4, 5), np.uint8), "is not an image"),
        (np.zeros((1, 100, 3), np.uint8), "longer than 32 times"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, reason: str) -> None:
    for form in (array, npy(array)):
        with pytest.raises(BadImage, match=reason):
            decode(form)


def test_objects_and_lying_headers_of_npy_files() -> None:
    with pytest.raises(BadImage, match="Python objects"):
        decode(npy(np.array([[{}]], dtype=object)))
    data = npy(np.zeros((4, 4, 3), np.uint8)).replace(b"(4, 4, 3)", b"(99999, 99999, 3)")
    with pytest.raises(BadImage):
        decode(data)
    with pytest.raises(BadImage, match="more than the file holds"):
        decode(npy(np.zeros((90, 90, 3), np.uint8))[:-9000])
    with pytest.raises(BadImage, match="not a readable"):
        decode(npy(np.zeros((90, 90, 3), np.uint8))[:-1])
    with pytest.raises(BadImage, match="not a readable"):
        decode(b"\x93NUMPY\x01\x00\xff\xff{")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), name)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text" * 9, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start a program
        (png_of(8, 2, [b""], 60000)[:16] + struct.pack(">II", 60000, 60000) + b"\x08\x02\0\0\0", "not an image|pixels"),
        (png_of(8, 2, [b""], 30), "truncated"),
    ],
)
def test_what_is_not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    rows = [b"\0" * 2_500] * 20_000
    bomb = png_of(1, 0, rows, 20_000)
    assert len(bomb) < 100_000  # 400 million pixels
    with pytest.raises(BadImage, match="more than 179 million pixels: a decompression bomb"):
        decode(bomb)
    with pytest.raises(BadImage, match="bomb"):
        read_size(bomb)


def test_strips_are_refused() -> None:
    with pytest.raises(BadImage, match="1 x 33 pixels: longer than 32 times"):
        decode(Image.new("RGB", (1, 33)))
    assert decode(Image.new("RGB", (1, 32))).shape == (3, 32, 1)


def test_a_picture_cannot_give_seven_channels() -> None:
    with pytest.raises(BadImage, match=r"cannot give 7 channels \(use .npy files\)"):
        decode(saved(Image.fromarray(RAMP)), channels=7)


# --- jpeg_draft -------------------------------------------------------------------------------------------------------


def test_jpeg_draft_is_smaller_never_too_small_and_off_by_default() -> None:
    data = saved(Image.fromarray(RAMP).resize((300, 200)), "JPEG")
    draft = Decoding(jpeg_draft=True)
    assert read_image(data, Decoding(), at_least=50).pixels.shape == (3, 200, 300)
    assert read_image(data, draft).pixels.shape == (3, 200, 300)
    for at_least, short in ((200, 200), (120, 200), (100, 100), (51, 100), (50, 50), (20, 25)):
        decoded = read_image(data, draft, at_least=at_least)
        assert decoded.pixels.shape[1] == short >= at_least
        assert decoded.original_size == (200, 300)
    png = saved(Image.fromarray(RAMP).resize((300, 200)))
    assert read_image(png, draft, at_least=20).pixels.shape == (3, 200, 300)


def test_the_file_on_disk_is_all_that_matters(tmp_path: Path) -> None:
    (tmp_path / "really_a_png.jpg").write_bytes(saved(Image.fromarray(RAMP)))
    assert (hwc(decode((tmp_path / "really_a_png.jpg").read_bytes())) == RAMP).all()
