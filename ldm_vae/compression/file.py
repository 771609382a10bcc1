"""File of compressed images; numbers are little-endian.

0   8 bytes    MAGIC
8   uint16     version of the format
10  uint32     length of the header
14             header: JSON, deflated (zlib); `Header` has its fields
..  4 x words  the entropy coder's words, uint32
..  32 bytes   SHA-256 of all before
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from ldm_vae.compression.bits_back import BitsBack
from ldm_vae.compression.entropy_coder import Code, OtherContentError, environment, pinned
from ldm_vae.compression.indices import Indices
from ldm_vae.core.config import Section, validate
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import SMALL
from ldm_vae.core.numbers import Count
from ldm_vae.core.terminal import print_note
from ldm_vae.core.validation import disguise, parse_json

MAGIC = b"\x89LVC\r\n\x1a\n"  # as PNG's: a transfer as text changes it
VERSION = 1
FIXED = struct.Struct("<8sHI")
DIGEST = 32
LONGEST = 220  # bytes of a part of a name; file systems have 255, for the ending and a temporary name too

Pixels = Annotated[int, Field(gt=0, le=2**15)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Header(Section):
    """Description of a code, and of what has to be here again to decode it."""

    kind: Literal["bits_back", "indices"]
    networks: tuple[Checksum, Checksum, Checksum]
    """SHA-256 of the VAE's encoder and decoder, and of the likelihood or the prior."""
    names: tuple[str, ...] = Field(min_length=1)
    """Of the images: relative paths without an ending."""
    sizes: tuple[tuple[Pixels, Pixels], ...]
    """Height and width of each."""
    words: Count
    seed: int = Field(ge=0, le=2**24)
    """Words of which `kept` are at the bottom of the stack and left out, and the others in it."""
    kept: int = Field(ge=0, le=2**24)
    content: Checksum
    """Of the images, or of the indices."""
    environment: dict[str, str]

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        files = {f"{name}.png" for name in names}
        for name in names:
            plain = name.isprintable() and "\\" not in name and ":" not in name[:2]
            if not plain or any(part in ("", ".", "..") or len(part.encode()) > LONGEST for part in name.split("/")):
                raise ValueError(
                    f"expected relative paths of printable characters, of at most {LONGEST} bytes a part, got "
                    f"{name[:80]!r}"
                )
            if any(str(folder) in files for folder in PurePosixPath(name).parents):
                raise ValueError(f"{name!r} is below the file of another image")
        if len(files) < len(names):
            raise ValueError("expected names that differ")
        return names

    @model_validator(mode="after")
    def _check(self) -> Header:
        if len(self.sizes) != len(self.names):
            raise ValueError(f"sizes: expected one for each of {len(self.names)} names, got {len(self.sizes)}")
        if self.kept > self.seed:
            raise ValueError(f"kept: expected at most {self.seed}, got {self.kept}")
        return self


Codec = BitsBack | Indices


def write(codec: Codec, names: Sequence[str], images: Sequence[torch.Tensor]) -> bytes:
    """The file's content. Raises UsageError for a name that no file could have elsewhere."""
    with pinned():
        code = codec.encode(images)
    fields = {
        "kind": codec.kind, "networks": codec.networks, "names": names,
        "sizes": [tuple(image.shape[1:]) for image in images], "words": len(code.words), "seed": code.seed,
        "kept": code.kept, "content": code.content, "environment": environment(),
    }  # fmt: skip
    header = validate(Header, fields, "IMAGE").model_dump_json().encode()
    packed = zlib.compress(header, 9)
    data = FIXED.pack(MAGIC, VERSION, len(packed)) + packed + code.words.astype("<u4").tobytes()
    return data + hashlib.sha256(data).digest()


def read(data: bytes, place: str) -> tuple[Header, Code]:
    """Content of a file; `place` opens every sentence about it.

    Raises:
        UsageError: it is another file, damaged, or of a newer version.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise UsageError(f"{place}: {disguise(data[:512]) or 'is no file of `ldm-vae compress`'}")
    if len(data) < FIXED.size + DIGEST or hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        raise UsageError(f"{place}: is damaged or cut off: its bytes do not match their checksum")
    _, version, length = FIXED.unpack_from(data)
    if version != VERSION:
        raise UsageError(f"{place}: has version {version} of the format, this ldm-vae reads {VERSION}")
    body = data[FIXED.size : -DIGEST]
    try:
        # bounded: a megabyte of zeros is a kilobyte of these
        unpack = zlib.decompressobj()
        text = unpack.decompress(body[:length], SMALL)
        if not unpack.eof:
            raise ValueError(f"longer than {SMALL:,} bytes, or cut off")
        tree = parse_json(text)
    except (zlib.error, ValueError) as error:
        raise UsageError(f"{place}: its header cannot be read: {error}") from error
    header = validate(Header, tree, f"{place}: its header")
    if len(body) != length + 4 * header.words:
        raise UsageError(
            f"{place}: expected {header.words:,} words behind the header, got {len(body) - length:,} bytes"
        )
    words = np.frombuffer(body, "<u4", offset=length) if header.words else np.zeros(0, "<u4")
    return header, Code(words.astype(np.uint32), header.content, header.seed, header.kept)


def decode(codec: Codec, header: Header, code: Code, place: str) -> list[torch.Tensor]:
    """Images uint8 [C, H, W] of a file.

    Raises:
        UsageError: it was made with another network.
        WorkError: this machine computes other probabilities than the one that made it.
    """
    if header.kind != codec.kind:
        expected = "--prior with the VQ autoencoder" if header.kind == "indices" else "no --prior"
        raise UsageError(f"{place}: holds {header.kind}; expected {expected}")
    if header.networks != codec.networks:
        third = "prior" if header.kind == "indices" else "likelihood"
        of = third if header.networks[:2] == codec.networks[:2] else "VAE"
        raise UsageError(f"{place}: was made with another {of} than is given")
    here = environment()
    other = ", ".join(
        f"{name} {was} (here {here.get(name)})" for name, was in header.environment.items() if was != here.get(name)
    )
    if other:
        print_note(f"{place}: was made with {other}; where that rounds otherwise it cannot be decoded")
    try:
        with pinned():
            return codec.decode(code, header.sizes)
    except OtherContentError as error:
        why = f"it was made with {other}" if other else "the networks compute other probabilities than when it was made"
        raise WorkError(f"{place}: what comes out does not match its checksum: {why}") from error


def parts_of(data: bytes) -> dict[str, int]:
    """Bytes of a file's parts: header (with its checksum), seed (what of it is in the stack), images."""
    header, _ = read(data, "the file")
    seed = 4 * (header.seed - header.kept)
    return {"header": len(data) - 4 * header.words, "seed": seed, "images": 4 * header.words - seed}


def in_words(data: bytes, images: Sequence[torch.Tensor]) -> str:
    """Bytes of a file of images uint8 [C, H, W] by its parts, and their rate."""
    parts = parts_of(data)
    values, pixels = (sum(one.numel() for one in some) for some in (images, [image[0] for image in images]))
    return (
        f"{len(images):,} images in {len(data):,} bytes: header {parts['header']:,}, seed {parts['seed']:,}, images "
        f"{parts['images']:,}, which are {8 * parts['images'] / values:.4f} bits per value and "
        f"{8 * parts['images'] / pixels:.4f} per pixel"
    )
