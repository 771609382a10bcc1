"""Values that become black and white: by the declared type, by value_range, or refused; over all number types and all
containers of arrays; and the warning where hardly any of the range is used."""

from __future__ import annotations

import io
import logging
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentences import refused

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import buckets
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.decoding import Decoding, decode, read_image
from ldm_vae.data.ordered import ordered_loader
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import open_source
from ldm_vae.data.sources.hub import HubSource
from ldm_vae.data.stream import Stream
from ldm_vae.data.survey import lines, survey
from ldm_vae.data.transforms import TransformConfig
from ldm_vae.metrics.batches import image_batches

RAMP = np.linspace(0, 1, 24).reshape(4, 6)
Range = tuple[float, float]
OWN: dict[str, Range | None] = {
    "bool": (0, 1), "uint8": (0, 255), "uint16": (0, 65535), ">u2": (0, 65535),
    "float16": (0, 1), "float32": (0, 1), "float64": (0, 1),
    "int8": None, "int16": None, "int32": None, "int64": None, "uint32": None, "uint64": None, ">i4": None,
}  # fmt: skip
ASKED: dict[str, Range] = {name: (0.25, 0.75) if "f" in name else (0, 100) for name in OWN} | {"bool": (0, 2)}


def values_of(name: str) -> np.ndarray[Any, Any]:
    """[4, 6] of a type, over the range that is its own, or 0 to 100."""
    low, high = OWN[name] or (0, 100)
    values = low + RAMP * (high - low)
    return (values if "f" in name else np.rint(values)).astype(name)


def expected(array: np.ndarray[Any, Any], value_range: Range) -> np.ndarray[Any, Any]:
    low, high = value_range
    return np.rint(((array.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)


# --- containers: each puts one array into a source --------------------------------------------------------------------


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def in_folder(array: np.ndarray[Any, Any], place: Path) -> Path:
    (place / "folder").mkdir()
    (place / "folder" / "a.npy").write_bytes(npy(array))
    return place / "folder"


def in_zip(array: np.ndarray[Any, Any], place: Path) -> Path:
    with zipfile.ZipFile(place / "all.zip", "w") as archive:
        archive.writestr("a.npy", npy(array))
    return place / "all.zip"


def in_list(array: np.ndarray[Any, Any], place: Path) -> Path:
    (place / "a.npy").write_bytes(npy(array))
    (place / "list.txt").write_text("a.npy\n")
    return place / "list.txt"


def in_tar(array: np.ndarray[Any, Any], place: Path) -> Path:
    with tarfile.open(place / "0.tar", "w") as archive:
        entry = tarfile.TarInfo("a.npy")
        entry.size = len(npy(array))
        archive.addfile(entry, io.BytesIO(npy(array)))
    return place / "0.tar"


def in_tiff(array: np.ndarray[Any, Any], place: Path) -> Path:
    (place / "tiff").mkdir()
    Image.fromarray(array).save(place / "tiff" / "a.tif")
    return place / "tiff"


def in_png(array: np.ndarray[Any, Any], place: Path) -> Path:
    (place / "png").mkdir()
    Image.fromarray(array).save(place / "png" / "a.png")
    return place / "png"


def _saved(feature: Any, value: Any, place: Path, form: str | None = None) -> Path:
    rows = {"image": [value, value], "n": [0, 1]}
    features = datasets.Features({"image": feature, "n": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    (dataset if form is None else dataset.with_format(form)).save_to_disk(place / "saved")
    return place / "saved"


def in_array2d(array: np.ndarray[Any, Any], place: Path) -> Path:
    return _saved(datasets.Array2D(array.shape, array.dtype.name), array.tolist(), place)


def in_array2d_numpy(array: np.ndarray[Any, Any], place: Path) -> Path:
    """Saved after `with_format("numpy")`, which the folder remembers, and which makes every integer an int64."""
    return _saved(datasets.Array2D(array.shape, array.dtype.name), array.tolist(), place, "numpy")


def in_array3d(array: np.ndarray[Any, Any], place: Path) -> Path:
    return _saved(datasets.Array3D((1, *array.shape), array.dtype.name), array[None].tolist(), place)


def in_sequences(array: np.ndarray[Any, Any], place: Path) -> Path:
    return _saved(datasets.Sequence(datasets.Sequence(datasets.Value(array.dtype.name))), array.tolist(), place)


def in_fixed_sequences(array: np.ndarray[Any, Any], place: Path) -> Path:
    inner = datasets.Sequence(datasets.Value(array.dtype.name), array.shape[1])
    return _saved(datasets.Sequence(inner, array.shape[0]), array.tolist(), place)


def in_parquet(array: np.ndarray[Any, Any], place: Path) -> Path:
    """As other tools write it: no features, only arrow's types."""
    kind = pa.list_(pa.list_(pa.from_numpy_dtype(array.dtype)))
    pq.write_table(pa.table({"image": pa.array([list(array), list(array)], kind)}), place / "plain.parquet")
    return place / "plain.parquet"


ANY = {name: tuple(OWN) for name in ("in_folder", "in_zip", "in_list", "in_tar")}
COLUMNS = (
    "in_array2d", "in_array2d_numpy", "in_array3d", "in_sequences", "in_fixed_sequences", "in_parquet",
)  # fmt: skip
NATIVE = tuple(name for name in OWN if not name.startswith(">"))
HELD = (
    ANY
    | dict.fromkeys(COLUMNS, NATIVE)
    | {"in_tiff": ("bool", "uint8", "uint16", "int32", "float32"), "in_png": ("bool", "uint8", "uint16")}
)
CASES = [(container, name) for container, names in HELD.items() for name in names]


def pixels_of(path: Path, value_range: Range | None) -> list[np.ndarray[Any, Any]]:
    source = open_source(path, channels=1, value_range=value_range)
    return [read_image(source[index].image, source.decoding).pixels[0].numpy() for index in range(len(source))]


@pytest.mark.parametrize(("container", "name"), CASES)
def test_the_declared_type_decides_or_value_range_does(container: str, name: str, tmp_path: Path) -> None:
    array = values_of(name)
    path = globals()[container](array, tmp_path)
    for asked in (None, ASKED[name]):
        value_range = asked or OWN[name]
        if value_range is None:
            with pytest.raises(UsageError if container in COLUMNS else BadImage, match=r"data\.value_range"):
                pixels_of(path, None)
            continue
        for pixels in pixels_of(path, asked):
            assert (pixels == expected(array, value_range)).all(), (asked, pixels)


@pytest.mark.parametrize("name", NATIVE)
def test_streams_of_array_columns_keep_the_declared_type(name: str, tmp_path: Path) -> None:
    array = values_of(name)
    path = in_sequences(array, tmp_path)
    for asked in (None, ASKED[name]):
        value_range = asked or OWN[name]
        if value_range is None:
            with refused(UsageError, "data.value_range"):
                open_source(path, kind="hub", streaming=True)
            continue
        stream = open_source(path, kind="hub", streaming=True, channels=1, value_range=asked)
        assert isinstance(stream, Stream)
        for record in stream:
            pixels = read_image(record.image, stream.decoding).pixels
            assert (pixels[0].numpy() == expected(array, value_range)).all()


def test_lists_without_a_declared_type_need_a_range() -> None:
    """A dataset whose features nobody knows: Python's integers have no type."""
    from ldm_vae.data.sources.hub import as_image

    with pytest.raises(BadImage, match=r"data\.value_range"):
        decode(as_image([[0, 255], [3, 4]]), channels=1)
    assert decode(as_image([[0, 255]]), channels=1, value_range=(0, 255)).flatten().tolist() == [0, 255]


def test_holes_in_an_array_column_are_bad_images(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([[[1, 2], [3, None]], [[1], [2, 3]]], pa.list_(pa.list_(pa.uint8())))})
    pq.write_table(table, tmp_path / "holes.parquet")
    source = open_source(tmp_path / "holes.parquet")
    for index in (0, 1):
        with pytest.raises(BadImage):
            source[index]


def test_the_sentence_of_a_column_says_what_it_holds(tmp_path: Path) -> None:
    path = in_array2d(np.array([[-1024, 3071]] * 2, dtype=np.int16), tmp_path)
    with refused(UsageError, "data.value_range") as error:
        open_source(path)
    assert "int16" in str(error.value) and "-1024" in str(error.value) and "3071" in str(error.value)


def test_one_sentence_where_every_image_needs_a_range(tmp_path: Path) -> None:
    source = open_source(in_folder(values_of("int16"), tmp_path), channels=1)
    loader = training_loader(source, TransformConfig(), 4, seed=0, batch_size=1)
    with refused(WorkError, "data.value_range"):
        next(loader)


@pytest.mark.parametrize("value_range", [(3.0, 3.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(value_range: Range, tmp_path: Path) -> None:
    with refused(UsageError, "data.value_range"):
        open_source(in_folder(values_of("uint8"), tmp_path), value_range=value_range)
    with refused(UsageError, "data.value_range"):
        Decoding(value_range=value_range)


# --- 8-bit pictures ---------------------------------------------------------------------------------------------------


def saved(image: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_value_range_of_8_bit_files(name: str, mode: str) -> None:
    array = np.arange(0, 48, dtype=np.uint8).reshape(6, 8)
    array = array if mode == "L" else np.stack([array, array + 1, array + 2], axis=2)
    data = saved(Image.fromarray(array), name, **({"lossless": True} if name == "WEBP" else {}))
    pixels = decode(data, channels=3, value_range=(0, 51)).permute(1, 2, 0).numpy()
    assert (pixels == expected(array.reshape(6, 8, -1), (0, 51))).all()


def test_a_mask_of_zeros_and_ones() -> None:
    mask = (RAMP > 0.5).astype(np.uint8)
    for form in (mask, npy(mask), saved(Image.fromarray(mask)), saved(Image.fromarray(mask), "TIFF")):
        assert (decode(form, channels=1, value_range=(0, 1))[0].numpy() == mask * 255).all()


def test_alpha_and_transparent_colours_are_not_stretched() -> None:
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1] = (10, 20, 40, 255), (10, 20, 40, 0)
    pixels = decode(saved(Image.fromarray(rgba)), channels=4, value_range=(0, 40)).permute(1, 2, 0)
    assert pixels.tolist() == [[[64, 128, 255, 255], [64, 128, 255, 0]]]
    pair = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    keyed = decode(saved(pair, transparency=(1, 2, 3)), value_range=(0, 6), background=(9, 9, 9)).permute(1, 2, 0)
    assert keyed.tolist() == [[[9, 9, 9], [170, 212, 255]]]


@pytest.mark.parametrize("mode", ["P", "CMYK", "deep", "few", "ppm"])
def test_pictures_whose_numbers_are_lost_refuse_a_range(mode: str) -> None:
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    data = {
        "P": lambda: saved(image.quantize(4)),
        "CMYK": lambda: saved(image.convert("CMYK"), "TIFF"),
        "deep": lambda: _png(16, 2, b"\0" * 24),
        "few": lambda: _png(4, 0, b"\0" * 2),
        "ppm": lambda: b"P6 4 4 15\n" + b"\x03" * 48,
    }[mode]()
    assert decode(data).shape == (3, 4, 4)
    with pytest.raises(BadImage, match=r"data\.value_range"):
        decode(data, value_range=(0, 1))


def _png(depth: int, colour: int, row: bytes) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)) + chunk(b"IEND", b"")


def test_the_depth_that_a_file_declares() -> None:
    """PGM of 12 bits, which Pillow widens; TIFF of 12 bits, of int16 and of uint32, which Pillow reads as it likes."""
    pgm = b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095)
    assert decode(pgm, channels=1).flatten().tolist() == [0, 128, 255]
    assert decode(pgm, channels=1, value_range=(0, 2048)).flatten().tolist() == [0, 255, 255]
    twelve = _tiff(12, 1, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), (4, 1))  # 0, 2048, 4095, 0
    assert decode(twelve, channels=1).flatten().tolist() == [0, 128, 255, 0]
    short = _tiff(16, 2, struct.pack("<3h", -1000, 0, 1000), (3, 1))
    with pytest.raises(BadImage, match=r"data\.value_range"):
        decode(short, channels=1)
    assert decode(short, channels=1, value_range=(-1000, 1000)).flatten().tolist() == [0, 128, 255]
    large = _tiff(32, 1, struct.pack("<3I", 0, 2**31, 2**32 - 1), (3, 1))
    assert decode(large, channels=1, value_range=(0, 2**32 - 1)).flatten().tolist() == [0, 128, 255]


def _tiff(bits: int, sample_format: int, data: bytes, size: tuple[int, int]) -> bytes:
    """A grey, uncompressed, little-endian TIFF."""
    tags = [
        (256, size[0]), (257, size[1]), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, size[1]),
        (279, len(data)), (339, sample_format),
    ]  # fmt: skip
    data += b"\0" * (len(data) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)


# --- the warning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def twelve_bits(tmp_path: Path) -> Path:
    """Ten pictures of 12 bits kept in uint16."""
    draw = np.random.default_rng(0)
    (tmp_path / "ct").mkdir()
    for number in range(10):
        np.save(tmp_path / "ct" / f"{number}.npy", draw.integers(0, 4096, (16, 16), dtype=np.uint16))
    return tmp_path / "ct"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "value_range" in record.getMessage()]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("reader", ["ordered", "evaluated", "trained"])
def test_a_range_that_is_hardly_used_is_said_once(
    reader: str, num_workers: int, twelve_bits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(**knobs: Any) -> None:
        source = open_source(twelve_bits, channels=1, **knobs)
        if reader == "trained":
            loader = training_loader(source, TransformConfig(), 16, seed=0, batch_size=4, num_workers=num_workers)
            for _ in range(4):
                next(loader)
        elif reader == "evaluated":
            list(image_batches(source, range(10), 16, batch_size=4, num_workers=num_workers))
        else:
            list(ordered_loader(source, 16, batch_size=4, num_workers=num_workers))

    with caplog.at_level(logging.WARNING):
        read(value_range=(0, 4095))
        assert not told(caplog)
        read()
        read()
    (sentence,) = told(caplog)
    assert str(twelve_bits) in sentence and "[0, 4095]" in sentence and "[0, 65535]" in sentence
    (low, high) = re.findall(r"\[(\d+), (40\d\d)\]", sentence)[0]
    assert int(low) < 20 and int(high) > 4000


def test_inspect_says_the_values_and_the_range(twelve_bits: Path) -> None:
    text = "\n".join(lines(survey(open_source(twelve_bits, channels=1)), 16, buckets.generate(256, 8)))
    assert "[0, 65535]" in text and "value_range [0, 4095]" in text
    text = "\n".join(lines(survey(open_source(twelve_bits, value_range=(0, 4095))), 16, buckets.generate(256, 8)))
    assert "[0, 4095]" in text and "value_range" not in text


def test_what_is_suggested_uses_the_range(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the values, the range that the warning names is accepted, uses more than a tenth, and cuts nothing."""
    draw = np.random.default_rng(1)
    kinds: list[tuple[Any, Any, np.dtype[Any], Range | None]] = [
        (0, 1, np.dtype("uint8"), None), (0, 20, np.dtype("uint8"), None), (40_000, 40_900, np.dtype("uint16"), None),
        (0, 0.01, np.dtype("float32"), None), (-10, 10, np.dtype("int16"), (-1000, 1000)),
        (100, 120, np.dtype("int64"), (0, 10_000)),
    ]  # fmt: skip
    for number, (low, high, dtype, asked) in enumerate(kinds):
        folder = tmp_path / str(number)
        folder.mkdir()
        array = (low + draw.random((16, 16)) * (high - low + (dtype.kind in "iu") * 0.999)).astype(dtype)
        np.save(folder / "a.npy", array)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            list(ordered_loader(open_source(folder, channels=1, value_range=asked), 16, batch_size=1))
            (sentence,) = told(caplog)
            named = re.findall(r"\[([-\d.e]+), ([-\d.e]+)\]", sentence)[-1]
            suggested = (float(named[0]), float(named[1]))
            assert suggested[0] <= array.min() + 1e-4 and array.max() - 1e-4 <= suggested[1], sentence
            caplog.clear()
            list(ordered_loader(open_source(folder, channels=1, value_range=suggested), 16, batch_size=1))
            assert not told(caplog)


def test_photographs_are_not_complained_about(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(ordered_loader(open_source(image_folder), 16, batch_size=4))
    assert not caplog.records


def test_a_hub_source_given_a_formatted_dataset(tmp_path: Path) -> None:
    array = values_of("uint8")
    features = datasets.Features({"image": datasets.Array2D(array.shape, "uint8"), "n": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": [array.tolist()], "n": [7]}, features=features)
    for form in (None, "numpy", "torch", "arrow"):
        formatted = dataset.with_format(form, columns=None if form is None else ["image"])
        source = HubSource(formatted, Decoding(1), None, None)
        assert torch.equal(decode(source[0].image, channels=1)[0], torch.from_numpy(array)), form
        assert source[0].columns == {"n": 7}
