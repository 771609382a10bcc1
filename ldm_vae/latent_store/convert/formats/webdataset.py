"""WebDataset: one tar per shard, of each sample KEY.TENSOR.npy for every tensor and KEY.json with the columns.

    wds.WebDataset("OUT/00000000.tar", shardshuffle=False).decode()    # sample["mean.npy"] [c, h, w], sample["json"]

A sample's members are told apart by what follows the first dot of their name, and a folder would become part of it; so
KEY is the store's key with everything but letters, digits, `_`, `-` and `~` written as %XX. Headers hold no time, owner
or host: the same store gives the same bytes. Identity and quarantine are in store.json beside the tars.

Reading is by the standard library, and nothing is unpacked: members are looked up by their place in the tar.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.data import tars
from ldm_vae.data.files import MAX_BYTES, read_range
from ldm_vae.data.quarantine import BadImage
from ldm_vae.latent_store.convert.formats import (
    Found,
    Options,
    Sketch,
    found,
    is_tensor,
    stored_name,
)
from ldm_vae.latent_store.convert.import_rows import Claim, group_of
from ldm_vae.latent_store.convert.npy import from_npy, npy_header, to_npy
from ldm_vae.latent_store.convert.sidecar import (
    MOST_JSON,
    Carried,
    as_numbers,
    becomes_text,
    read_carried,
    row_from_json,
    row_to_json,
    write_carried,
)
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.maintain.merge_split import StoredPiece
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors

CLIPS = True
HEADER = 256  # bytes that hold the header of a .npy file
Header = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that tars cannot hold, one phrase each."""
    lost = ["checksums and memory-mapped reading"]
    if manifest.identity.dtype == "bf16":
        lost.append("bf16: its values are written as float32, which holds them exactly")
    return lost + becomes_text(manifest)


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """Write FOLDER/NAME.tar and FOLDER/store.json."""
    bare = manifest.model_copy(update={"shards": ()})
    write_carried(folder, Carried(manifest=bare, quarantine=tuple(read_quarantine(pieces[0].store))))
    for piece in Progress(pieces, desc="convert", unit="shards", leave=False):
        with tarfile.open(folder / f"{piece.shard.name}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for tensors, samples in piece.read(np.arange(len(piece.keys))):
                numbers = as_numbers(manifest.identity, tensors)
                for position, row in enumerate(samples):
                    name = member_name(row["key"])
                    for tensor, values in numbers.items():
                        _add(archive, f"{name}.{tensor}.npy", to_npy(values[position]))
                    _add(archive, f"{name}.json", row_to_json(row))


def member_name(key: str) -> str:
    """A key as the part of a member's name before its first dot."""
    # the first dot of a member's name ends its key, and a slash would make a folder
    return quote(key, safe="").replace(".", "%2E")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # owner, mode and time are TarInfo's defaults, so equal rows give equal bytes
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


# --- back -------------------------------------------------------------------------------------------------------------


def carried(path: Path) -> Carried | None:
    """Read the store.json beside the tars."""
    _files(path)
    return read_carried(path if path.is_dir() else path.parent)


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UsageError(f"SRC {path}: no .tar files there (compressed ones cannot be looked up in: unpack them first)")
    return files


@dataclass
class _Places:
    """Offset and size of the members in a tar, of samples of one shape: a list for each tensor, and one for `json`."""

    keys: list[str] = field(default_factory=list)
    of: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)


def read(path: Path, origin: Carried | Claim) -> Found:
    """Find one piece per tar and latent shape."""
    sketches: list[Sketch] = []
    for file in Progress(_files(path), desc="look", unit="files", leave=False):
        for shape, places in _look(file).items():
            sketches.append(_sketch(file, shape, places, origin))
    return found(path, origin, sketches)


def _look(path: Path) -> dict[tuple[int, ...], _Places]:
    """Places of a tar's samples by latent shape. Samples without latents are left out."""
    by_shape: dict[tuple[int, ...], _Places] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for sample in tars.group(member for member, _ in tars.members(archive)):
                members: dict[str, tars.Member] = {}
                for member in sample.members:
                    if member.refused:
                        raise WorkError(f"{path}: {member.name!r} {member.refused}")
                    # sizes are the archive's claim: refused before anything is read
                    if member.size > (MOST_JSON if member.extension == "json" else MAX_BYTES):
                        raise WorkError(f"{path}: {member.name!r} is too large: {member.size:,} bytes")
                    name = member.extension.removesuffix(".npy")
                    if member.extension == "json" or (name != member.extension and is_tensor(name)):
                        members[stored_name(name)] = member
                headers = {name: _header(path, member) for name, member in members.items() if name != "json"}
                if not headers:
                    continue
                shape, _ = next(iter(headers.values()))
                places = by_shape.setdefault(shape, _Places())
                if not places.keys:
                    places.headers, places.of = headers, {name: [] for name in members}
                # one stack of arrays for each tensor: all samples of a shape have the same tensors in one type
                if headers != places.headers or members.keys() != places.of.keys():
                    raise WorkError(f"{path}: the sample {sample.key} has not the tensors that those before it have")
                places.keys.append(sample.key)
                for name, member in members.items():
                    places.of[name].append((member.offset, member.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read as a tar: {error}") from error
    return by_shape


def _header(path: Path, member: tars.Member) -> Header:
    try:
        return npy_header(io.BytesIO(read_range(path, member.offset, min(member.size, HEADER))))
    except (BadImage, ValueError) as error:
        raise WorkError(f"{path}: {member.name!r}: {error}") from error


def _sketch(path: Path, shape: tuple[int, ...], places: _Places, origin: Carried | Claim) -> Sketch:
    own = isinstance(origin, Carried)
    # only our own names are quoted; a stranger's % is a %
    keys = [unquote(key) for key in places.keys] if own else places.keys
    at = {name: np.array(pairs, dtype=np.int64) for name, pairs in places.of.items()}
    if own and "json" not in at:
        raise WorkError(f"{path}: its samples have no .json")
    group = origin.group(shape) if isinstance(origin, Claim) else group_of(_row(path, *at["json"][0]), path)

    def load(positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        step = chunk_rows(shape)
        for begin in range(0, len(positions), step):
            some = positions[begin : begin + step].tolist()
            tensors = {name: np.stack([_array(path, *at[name][row]) for row in some]) for name in places.headers}
            samples = [_row(path, *at["json"][row]) if "json" in at else {} for row in some]
            if isinstance(origin, Claim):
                samples = [origin.row(keys[n], n, group, row) for n, row in zip(some, samples, strict=True)]
            yield tensors, samples

    return Sketch(path, keys, shape, group, {name: dtype for name, (_, dtype) in places.headers.items()}, load)


def _array(path: Path, offset: int, size: int) -> npt.NDArray[Any]:
    try:
        return from_npy(read_range(path, offset, size))
    except (BadImage, ValueError) as error:
        raise WorkError(f"{path}: the .npy at byte {offset:,}: {error}") from error


def _row(path: Path, offset: int, size: int) -> dict[str, Any]:
    try:
        return row_from_json(read_range(path, offset, size))
    except (BadImage, ValueError) as error:
        raise WorkError(f"{path}: the .json at byte {offset:,}: {error}") from error
