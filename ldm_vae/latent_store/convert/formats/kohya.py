"""The latents cache of kohya-ss sd-scripts: one .npz beside each image, in the names of its `library/strategy_base.py`.

    PATH_WWWWxHHHH_sdxl.npz    PATH: the image's without its extension; WWWW, HHHH: its own size
        latents_32x32            [c, h, w] float32, one sample; h and w of the latent are part of every name
        latents_flipped_32x32    the mirror image's, where there is one
        original_size_32x32      [W, H];    crop_ltrb_32x32: where the image lies in its bucket, for SDXL

Put OUT's tree over the folder of the images. `_sd`, `_sdxl` and `_sd3` files hold raw latents, `_flux` ones are shifted
and scaled, as that program's own FLUX encoder leaves them. `ldm_vae_32x32`, the store's row as JSON, is read by nobody
else. For SD and SDXL the names changed twice; READERS says which versions find which:

    sized    as above
    plain    PATH_WWWWxHHHH_sdxl.npz, its arrays without _32x32
    old      PATH.npz, its arrays without _32x32
"""

from __future__ import annotations

import contextlib
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.core.validation import why_unreadable
from ldm_vae.data.files import beneath
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.tree import walk
from ldm_vae.latent_store.convert.formats import (
    Found,
    Options,
    Sketch,
    found,
)
from ldm_vae.latent_store.convert.import_rows import Claim, group_of, original_size
from ldm_vae.latent_store.convert.npy import from_npy, npy_header, to_npy
from ldm_vae.latent_store.convert.sidecar import (
    Carried,
    becomes_text,
    draw,
    loses_of_moments,
    one_sample,
    read_carried_tree,
    row_from_json,
    row_to_json,
    write_carried,
)
from ldm_vae.latent_store.format.chunks import CHUNK_ROWS
from ldm_vae.latent_store.format.layout import FLIP, TENSOR_NAMES, tensor_name
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.maintain.merge_split import StoredPiece
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors

CLIPS = False
MODELS = ("sd", "sdxl", "sd3", "flux")
SCALED = ("flux",)  # their caches hold latents that are normalised already
NAMES = ("sized", "plain", "old")
ROW = "ldm_vae"
MOST_BYTES = 1 << 28  # of one array
NAME = re.compile(r"(?P<path>.+)_(?P<width>\d{4,})x(?P<height>\d{4,})_(?P<model>" + "|".join(MODELS) + r")\.npz")
LATENTS = re.compile(r"latents(?P<size>_\d+x\d+)?\.npy")


@dataclass(frozen=True)
class Readers:
    """The versions of sd-scripts that find such names: those from `since` on, of that `date`, and what they do."""

    since: tuple[int, int, int]
    date: str
    but: str = ""


# read in its sources: v0.9.1 and before train_util.py; v0.10.0, v0.10.1 strategy_*.py; PRs 2269 and 2276 of v0.10.2
_BY_SIZE = Readers((0, 10, 2), "2026-03-29", "those before encode the images again")
_ANY_SIZE = "from 0.10.2 on they are taken whatever the size of the bucket"
READERS = {
    "sized": {"sd": _BY_SIZE, "sdxl": _BY_SIZE} | dict.fromkeys(("sd3", "flux"), Readers((0, 10, 0), "2026-01-19")),
    "plain": dict.fromkeys(("sd", "sdxl"), Readers((0, 10, 0), "2026-01-19", _ANY_SIZE)),
    "old": dict.fromkeys(("sd", "sdxl"), Readers((0, 7, 0), "2023-10-11", _ANY_SIZE)),
}


def readers(options: Options) -> str:
    """A sentence: which versions of sd-scripts read what `write` leaves."""
    found = READERS[options.names][str(options.model)]
    version = ".".join(map(str, found.since))
    other = [f"{names} {'.'.join(map(str, READERS[names][str(options.model)].since))}" for names in NAMES
             if names != options.names and options.model in READERS[names]]  # fmt: skip
    sentence = f"sd-scripts {version} ({found.date}) and later find these names (--names {options.names})"
    sentence += f"; {found.but}" if found.but else ""
    return sentence + (f"; other --names, and the first version for them: {', '.join(other)}" if other else "")


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that a folder of .npz files cannot hold, one phrase each."""
    if options.model not in MODELS:
        raise UsageError(
            f"--model: a cache is made for one kind of model; expected {', '.join(MODELS)}, got {options.model}"
        )
    if options.names not in NAMES or options.model not in READERS[options.names]:
        known = ", ".join(names for names in NAMES if options.model in READERS[names])
        raise UsageError(f"--names: for {options.model} sd-scripts knows {known}, got {options.names}")
    lost = loses_of_moments(manifest.identity)
    if options.model in SCALED:
        lost.append("raw latents: they are shifted and scaled, and come back equal to rounding only")
    lost.append("captions and other columns: sd-scripts reads them beside the images")
    lost += becomes_text(manifest)
    lost.append("the VAE: sd-scripts takes a file of the right size for its own, whatever made it")
    return lost


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """A .npz for each image; further resolutions of it are added to the same file."""
    identity = manifest.identity
    bare = manifest.model_copy(update={"identity": one_sample(identity), "shards": ()})
    write_carried(folder, Carried(manifest=bare, quarantine=tuple(read_quarantine(pieces[0].store))))
    order = itertools.count()
    for piece in Progress(pieces, desc="convert", unit="shards", leave=False):
        size = "_{}x{}".format(*piece.shape[1:]) if options.names == "sized" else ""
        for tensors, samples in piece.read(np.arange(len(piece.keys))):
            drawn = draw(identity, tensors, samples)
            if options.model in SCALED:
                drawn = {view: manifest.normalisation.apply(torch.from_numpy(z)).numpy() for view, z in drawn.items()}
            for position, row in enumerate(samples):
                height, width = original_size(row) or piece.group[1:]
                arrays = {"latents": drawn[""][position]}
                if FLIP in drawn:
                    arrays["latents_flipped"] = drawn[FLIP][position]
                arrays["original_size"] = np.array([width, height], dtype=np.int64)
                arrays["crop_ltrb"] = _crop_ltrb(piece.group[1:], (height, width))
                # the row travels as an array of bytes: an .npz holds nothing else, and sd-scripts ignores names it does
                # not know
                arrays[ROW] = np.frombuffer(row_to_json({"order": next(order), "row": row}), np.uint8)
                _add(_place(folder, row["key"], (height, width), options), size, arrays, row["key"])


def _place(folder: Path, key: str, original: Sequence[int], options: Options) -> Path:
    height, width = original
    # what sd-scripts looks for beside an image; the size is the image's own, width first
    end = "" if options.names == "old" else f"_{width:04d}x{height:04d}_{options.model}"
    try:
        # keys come from a store that somebody else may have written: none may climb out of the folder
        path = beneath(folder, f"{Path(key).with_suffix('')}{end}.npz")
    except (BadImage, ValueError) as error:
        raise WorkError(
            f"the key {key!r} is no path of an image, and sd-scripts looks for its cache by that"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _add(path: Path, size: str, arrays: dict[str, npt.NDArray[Any]], key: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        # a second row of the same names would be hidden by the first
        if f"latents{size}.npy" in archive.namelist():
            raise WorkError(
                f"{key}: another image has the same path up to the extension, and size, or it has another resolution, "
                "which only --names sized keeps apart: sd-scripts mixes them up"
            )
        for name, values in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}{size}.npy"), to_npy(values))  # ZipInfo: the date is 1980's


def _crop_ltrb(bucket: Sequence[int], original: Sequence[int]) -> npt.NDArray[np.float64]:
    """Left, top, right, bottom of the image when it is fitted into its bucket: sd-scripts' convention for SDXL's size
    conditioning (not what is cut off). Both sizes are (height, width)."""
    height, width = map(float, bucket)
    if bucket[1] * original[0] > original[1] * bucket[0]:
        width = bucket[0] * original[1] / original[0]
    else:
        height = bucket[1] * original[0] / original[1]
    # rounded down, as sd-scripts does
    left, top = (bucket[1] - width) // 2, (bucket[0] - height) // 2
    return np.array([left, top, left + width, top + height], dtype=np.float64)


# --- back -------------------------------------------------------------------------------------------------------------


carried = read_carried_tree


@dataclass(frozen=True)
class _Entry:
    """The latents of one image at one size, before they are read."""

    file: str
    size: str
    scaled: bool
    key: str
    order: int
    row: dict[str, Any]
    shape: tuple[int, ...]
    dtypes: dict[str, np.dtype[Any]]
    """By the names that the store has for them."""


def read(path: Path, origin: Carried | Claim) -> Found:
    """A piece for each run of images of one shape: in the store's order, or in that of their sizes and names."""
    entries: list[_Entry] = []
    others = 0
    for file in Progress(walk(path, frozenset({".npz"})), desc="look", unit="files", leave=False):
        here = _look(path, file, origin)
        others += not here
        entries += here
    # back into the store's order, so that the units are the ones they were
    entries.sort(key=lambda entry: (entry.order, entry.shape))
    runs = itertools.groupby(entries, lambda entry: (entry.shape, entry.row.get("resolution"), list(entry.dtypes)))
    sketches = [_sketch(path, list(run), origin) for _, run in runs]
    return found(path, origin, sketches, [f"{others:,} .npz without latents were left out"] if others else [])


def _look(root: Path, file: str, origin: Carried | Claim) -> list[_Entry]:
    named = NAME.fullmatch(file)
    kind = TENSOR_NAMES[origin.manifest.identity.store][0] if isinstance(origin, Carried) else "sample"
    entries = []
    with _opened(root / file) as archive:
        members = set(archive.namelist())
        for size in sorted(match["size"] or "" for name in members if (match := LATENTS.fullmatch(name))):
            dtypes = {}
            for name, view in ((f"latents{size}.npy", ""), (f"latents_flipped{size}.npy", FLIP)):
                if name in members:
                    with archive.open(name) as member:
                        shape, dtypes[tensor_name(kind, view)] = npy_header(member)
            if len(shape) != 3:
                raise ValueError(f"latents{size} has the shape {list(shape)}, not [c, h, w]")
            # a stranger's file: the key is its path, without the size that the name ends in
            key, order, row = named["path"] if named else file.removesuffix(".npz"), 0, {}
            if isinstance(origin, Carried):
                own = row_from_json(_array(archive, f"{ROW}{size}").astype(np.uint8).tobytes())
                key, order, row = str(own["row"]["key"]), int(own["order"]), dict(own["row"])
            elif f"original_size{size}.npy" in members:
                width, height = _array(archive, f"original_size{size}").reshape(2).tolist()
                row = {"original_size": [int(height), int(width)]}
            if isinstance(origin, Claim) and f"crop_ltrb{size}.npy" in members:
                left, top, right, bottom = _array(archive, f"crop_ltrb{size}").reshape(4).tolist()
                # the image is centred in its bucket, its left and top edge rounded down
                origin.check_crop(key, origin.group(shape), (top + bottom, left + right), slack=2)
            scaled = named is not None and named["model"] in SCALED
            entries.append(_Entry(file, size, scaled, key, order, row, shape, dtypes))
    return entries


def _sketch(root: Path, entries: list[_Entry], origin: Carried | Claim) -> Sketch:
    first = entries[0]
    group = origin.group(first.shape) if isinstance(origin, Claim) else group_of(first.row, root / first.file)

    def load(positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        for begin in range(0, len(positions), CHUNK_ROWS):
            some = positions[begin : begin + CHUNK_ROWS].tolist()
            each = [_latents(root, entries[place], origin) for place in some]
            rows = [entries[place].row for place in some]
            if isinstance(origin, Claim):
                rows = [origin.row(entries[n].key, n, group, row) for n, row in zip(some, rows, strict=True)]
            yield {name: np.stack([latents[name] for latents in each]) for name in first.dtypes}, rows

    return Sketch(root, [entry.key for entry in entries], first.shape, group, first.dtypes, load)


def _latents(root: Path, entry: _Entry, origin: Carried | Claim) -> Tensors:
    """Tensors of one image by the store's names, as they are in the file."""
    read: Tensors = {}
    with _opened(root / entry.file) as archive:
        for stored in entry.dtypes:
            name = "latents_flipped" if stored.endswith(FLIP) else "latents"
            values = _array(archive, f"{name}{entry.size}")
            if values.shape != entry.shape:
                raise ValueError(f"{name}{entry.size} has the shape {list(values.shape)}, not {list(entry.shape)}")
            if entry.scaled:
                values = origin.normalisation.undo(torch.from_numpy(values.astype(np.float32))).numpy()
            read[stored] = values
    return read


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UsageError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise WorkError(f"{path}: cannot be read: {why_unreadable(path, error)}") from error


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    return from_npy(_bytes(archive, name))


def _bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member, unpacked; the size that its header claims is not believed."""
    with archive.open(f"{name}.npy") as member:
        data = member.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} is larger than {MOST_BYTES:,} bytes")
    return data
