"""The latents cache of kohya-ss musubi-tuner: one .safetensors for each clip or image, in the names of its `dataset/`.

    clips/VIDEO_NNNNN-TTT_WWWWxHHHH_wan.safetensors    NNNNN: number of the clip in its video; TTT: its frames
    images/IMAGE_WWWWxHHHH_wan.safetensors             WWWW, HHHH: the video's or image's own size
        latents_5x32x32_float32    [c, t, h, w]; t, h and w are part of the name
        metadata: architecture, width, height, format_version, frame_count

Each folder is a `cache_directory`. Its programs know an item by the base name alone. `wan` and `k5` files hold latents
that are normalised already, `hv` and `hv15` ones raw ones; of a posterior its own encoder keeps the mean (wan, hv15) or
a sample (hv, k5), and so does this. `ldm_vae` in the metadata, the store's row as JSON, is read by nobody else.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.core.validation import why_unreadable
from ldm_vae.data.files import beneath
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.tree import walk
from ldm_vae.data.windows import video_of
from ldm_vae.latent_store.convert.formats import Found, Options, Sketch, found
from ldm_vae.latent_store.convert.import_rows import Claim, group_of, original_size
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
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import CLIP_FRAMES, TENSOR_NAMES
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.maintain.merge_split import StoredPiece
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors
from ldm_vae.latent_store.storage.objects import LocalFolder


@dataclass(frozen=True)
class Architecture:
    """A diffusion model of musubi-tuner: its name in the metadata, and what its cache holds."""

    name: str
    channels: int
    normalised: bool
    mean: bool
    """The posterior's mean, not a sample of it."""


CLIPS = True
# read in its sources: dataset/cache_io.py, dataset/image_video_dataset.py and each *_cache_latents.py
MODELS = {
    "hv": Architecture("hunyuan_video", 16, normalised=False, mean=False),
    "hv15": Architecture("hunyuan_video_1_5", 32, normalised=False, mean=True),
    "wan": Architecture("wan", 16, normalised=True, mean=True),
    "k5": Architecture("kandinsky5", 16, normalised=True, mean=False),
}
VERSION = "1.0.1"
ROW = "ldm_vae"
NAME = re.compile(r".+_(?P<width>\d{4,})x(?P<height>\d{4,})_[^_/]+\.safetensors")
LATENTS = re.compile(r"latents_\d+x\d+x\d+_(?:float32|float16|bfloat16)")


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that the cache cannot hold, one phrase each."""
    if options.model not in MODELS:
        raise UsageError(
            f"--model: a cache is made for one kind of model; expected {', '.join(MODELS)}, got {options.model}"
        )
    model, identity = MODELS[options.model], manifest.identity
    for shard in manifest.shards:
        if identity.codes is None and shard.shape[0] != model.channels:
            raise UsageError(
                f"--model: latents for {options.model} have {model.channels} channels, and those of this store "
                f"{shard.shape[0]}"
            )
    if len(sizes := sorted({shard.resolution for shard in manifest.shards})) > 1:
        raise UsageError(
            "--to: musubi-tuner batches clips by the size of their video, and this store holds them at the resolutions "
            f"{', '.join(map(str, sizes))}; `ldm-vae store split --where resolution=N` gives one"
        )
    lost = loses_of_moments(_taken(identity, model))
    if identity.store == "moments" and model.mean:
        lost.append("logvar: musubi-tuner trains on the posterior's mean")
    if len(identity.views) > 1:
        lost.append(f"the views {', '.join(identity.views[1:])}: there is a place for the clip itself only")
    if identity.pixels:
        lost.append("the stored pixels")
    if model.normalised:
        manifest.normalisation  # noqa: B018 (raises where the VAE names none)
        lost.append("raw latents: they are normalised, and come back equal to rounding only")
    else:
        lost.append("the normalisation: musubi-tuner multiplies by the scaling_factor of its own VAE")
    lost.append("captions and other columns: musubi-tuner reads its own, by the name of the clip")
    lost += becomes_text(manifest)
    lost.append("the VAE: musubi-tuner takes any file of the right name for its own, whatever made it")
    return lost


def _taken(identity: Identity, model: Architecture) -> Identity:
    """The identity of a store with what there is a place for, but its posteriors where a sample of them is drawn."""
    changes: dict[str, Any] = {"views": ("",), "pixels": False}
    if identity.store == "moments" and model.mean:
        changes["store"] = "mean"
    return identity.model_copy(update=changes)


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """Write OUT/clips and OUT/images."""
    model = MODELS[str(options.model)]
    taken = _taken(manifest.identity, model)
    bare = manifest.model_copy(update={"identity": one_sample(taken), "shards": ()})
    write_carried(folder, Carried(manifest=bare, quarantine=tuple(read_quarantine(pieces[0].store))))
    order, names = itertools.count(), _Names(folder, str(options.model))
    for piece in Progress(pieces, desc="convert", unit="shards", leave=False):
        for tensors, samples in piece.read(np.arange(len(piece.keys))):
            latents = draw(taken, tensors, samples)[""]
            if model.normalised:
                latents = manifest.normalisation.apply(torch.from_numpy(latents)).numpy()
            for z, row in zip(latents, samples, strict=True):
                frames, size = row.get(CLIP_FRAMES), original_size(row) or piece.group[1:3]
                metadata = {"architecture": model.name, "width": str(size[1]), "height": str(size[0])}
                metadata["format_version"] = VERSION
                if frames is not None:
                    metadata["frame_count"] = str(frames)
                metadata[ROW] = row_to_json({"order": next(order), "row": row}).decode()
                _save(names.place(row["key"], size, frames or 1), z if z.ndim == 4 else z[:, None], metadata)


class _Names:
    """Names of the files, no two alike: a base name belongs to one video or image."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model
        self._owners: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def place(self, key: str, size: Sequence[int], frames: int) -> Path:
        """The file of a clip, without its extension. Raises WorkError where its name would be another's."""
        video, position = video_of(key)
        is_clip = frames > 1 or bool(position)
        name = PurePosixPath(PurePosixPath(video).name).stem
        part = f"{'clips' if is_clip else 'images'}/{name}"
        if self._owners.setdefault(part, video) != video:
            raise WorkError(
                f"{key}: has the base name of {self._owners[part]}, by which alone musubi-tuner knows a video; "
                "rename one, or `store split` can leave it out"
            )
        number = self._counts[part] = self._counts.get(part, -1) + 1
        which = f"_{number:05d}-{frames:03d}" if is_clip else ""
        try:
            path = beneath(self._folder, f"{part}{which}_{size[1]:04d}x{size[0]:04d}_{self._model}")
        except (BadImage, ValueError) as error:
            raise WorkError(f"the key {key!r} is no path of a video, and the cache is named by that") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _save(path: Path, z: npt.NDArray[np.float32], metadata: dict[str, str]) -> None:
    """z [c, t, h, w]: its channels are the rows of what the store's own writer writes, whose bytes do not vary."""
    name = f"latents_{'x'.join(map(str, z.shape[1:]))}_float32"
    spool = shards.Spool(path.parent, [shards.TensorSpec(name, "F32", z.shape[1:])])
    try:
        spool.append({name: z.astype("<f4", copy=False)})
        shards.write_tensors(LocalFolder(path.parent), path.name, spool, None, metadata)
    finally:
        spool.close()


# --- back -------------------------------------------------------------------------------------------------------------


carried = read_carried_tree


@dataclass(frozen=True)
class _Entry:
    """The latents of one clip, before they are read."""

    file: str
    tensor: str
    model: Architecture
    key: str
    order: int
    row: dict[str, Any]
    shape: tuple[int, ...]


def read(path: Path, origin: Carried | Claim) -> Found:
    """A piece for each run of clips of one shape: in the store's order, or in that of their names."""
    entries: list[_Entry] = []
    others = 0
    for file in Progress(walk(path, frozenset({".safetensors"})), desc="look", unit="files", leave=False):
        here = _look(path, file, origin)
        others += here is None
        entries += [] if here is None else [here]
    entries.sort(key=lambda entry: entry.order)
    runs = itertools.groupby(entries, lambda entry: (entry.shape, entry.row.get("resolution"), entry.model))
    sketches = [_sketch(path, list(run), origin) for _, run in runs]
    return found(path, origin, sketches, [f"{others:,} .safetensors without latents were left out"] if others else [])


def _look(root: Path, file: str, origin: Carried | Claim) -> _Entry | None:
    with _opened(root / file) as opened:
        tensors = [name for name in opened.keys() if LATENTS.fullmatch(name)]  # noqa: SIM118 (not a dict)
        metadata = opened.metadata() or {}
        model = next((one for one in MODELS.values() if one.name == metadata.get("architecture")), None)
        if not tensors:
            return None
        if len(tensors) > 1 or model is None:
            names = ", ".join(one.name for one in MODELS.values())
            raise ValueError(
                f"expected latents of one clip for {names}, got {len(tensors)} for {metadata.get('architecture')}"
            )
        shape = tuple(opened.get_slice(tensors[0]).get_shape())
        if len(shape) != 4:
            raise ValueError(f"expected latents [c, t, h, w], got {list(shape)}")
        # a stranger's file: the key is its path, and of a video's clips what says which one
        key, order, row = file.removesuffix(".safetensors"), 0, {}
        if isinstance(origin, Carried):
            own = row_from_json(metadata[ROW].encode())
            key, order, row = str(own["row"]["key"]), int(own["order"]), dict(own["row"])
            if row.get(CLIP_FRAMES) is None:
                shape = (shape[0], *shape[2:])
        elif (named := NAME.fullmatch(file)) is not None:
            row = {"original_size": [int(named["height"]), int(named["width"])]}
    return _Entry(file, tensors[0], model, key, order, row, shape)


def _sketch(root: Path, entries: list[_Entry], origin: Carried | Claim) -> Sketch:
    first = entries[0]
    tensor = TENSOR_NAMES[origin.manifest.identity.store][0] if isinstance(origin, Carried) else "sample"
    group = origin.group(first.shape) if isinstance(origin, Claim) else group_of(first.row, root / first.file)

    def load(positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        step = chunk_rows(first.shape)
        for begin in range(0, len(positions), step):
            some = positions[begin : begin + step].tolist()
            z = torch.stack([_latents(root, entries[place]) for place in some])
            if first.model.normalised:
                z = origin.normalisation.undo(z)
            rows = [entries[place].row for place in some]
            if isinstance(origin, Claim):
                rows = [origin.row(entries[n].key, n, group, row) for n, row in zip(some, rows, strict=True)]
            yield {tensor: z.numpy()}, rows

    return Sketch(root, [entry.key for entry in entries], first.shape, group, {tensor: np.dtype("<f4")}, load)


def _latents(root: Path, entry: _Entry) -> torch.Tensor:
    with _opened(root / entry.file) as opened:
        z: torch.Tensor = opened.get_tensor(entry.tensor)
    return z.float().reshape(entry.shape)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except UsageError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WorkError(f"{path}: cannot be read: {why_unreadable(path, error)}") from error
