"""Files of every kind that a source reads, with the same pictures in each."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KINDS = ("folder", "list", "zip", "tar", "parquet", "paths")
COUNT = 6


def bmp(number: int, side: int = 20) -> bytes:
    """A picture whose size in bytes depends on its side alone."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def photograph(number: int, side: int = 256) -> Image.Image:
    """A picture with a spectrum like a photograph's, 1 / f."""
    draw, picture = np.random.default_rng(number), np.zeros((side, side, 3))
    for octave in range(2, 8):
        coarse = Image.fromarray(draw.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        picture += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 2.0**octave
    return Image.fromarray((picture * 2.03).clip(0, 255).astype(np.uint8))


def pictures(**changed: bytes) -> dict[str, bytes]:
    return {f"img_{n}.bmp": changed.get(f"img_{n}", bmp(n)) for n in range(COUNT)}


def write(kind: str, place: Path, content: dict[str, bytes]) -> Path:
    """Files that hold the pictures, over those that are there, and what DATA is then."""
    place.mkdir(parents=True, exist_ok=True)
    if kind in ("folder", "list", "paths"):
        for name, data in content.items():
            path = place / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
    if kind == "list":
        (place / "all.lst").write_text("\n".join(content))
        return place / "all.lst"
    if kind == "zip":
        with zipfile.ZipFile(place / "all.zip", "w") as archive:
            for name, data in content.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        return place / "all.zip"
    if kind == "tar":
        with tarfile.open(place / "all.tar", "w") as tar:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return place / "all.tar"
    if kind == "parquet":
        column = [{"bytes": data, "path": None} for data in content.values()]
    elif (place / "paths.parquet").exists():
        return place / "paths.parquet"  # the table stays, the files behind it do not
    elif kind == "paths":
        column = [{"bytes": None, "path": str(place / name)} for name in content]
    else:
        return place
    pq.write_table(pa.table({"image": column}), place / f"{kind}.parquet")
    return place / f"{kind}.parquet"


def times(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def set_back(before: dict[Path, int]) -> None:
    """mtime as it was, to the nanosecond: what `touch -d` and `cp -p` can do. (ctime nobody can set.)"""
    for path, mtime in before.items():
        if path.stat().st_mtime_ns != mtime:  # it would give a file that was left alone a new ctime
            os.utime(path, ns=(mtime, mtime))
