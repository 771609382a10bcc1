"""Shards of LightningDiT's `extract_features.py`, as its `ImgLatentDataset` reads them.

    latents_rank00_shard000.safetensors    labels [N] int64, latents and latents_flip [N, c, h, w] float32, unscaled
    latents_stats.pt                       {"mean", "std"}, each [1, c, 1, 1]: its reader whitens with them

Its reader takes all *.safetensors of the folder in the order of their names, of each row `latents` or `latents_flip` at
random, and makes latents_stats.pt itself where that is missing. What it has no place for lies beside: store.json, and a
.parquet of the same name with the columns of each shard. On the way back latents_stats.pt, a pickle, is not opened: the
statistics are measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.convert.formats import (
    Found,
    Options,
    Sketch,
    found,
)
from ldm_vae.latent_store.convert.import_rows import Claim, group_of
from ldm_vae.latent_store.convert.sidecar import (
    Carried,
    draw,
    loses_of_moments,
    one_sample,
    read_carried,
    write_carried,
)
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.chunks import CHUNK_ROWS
from ldm_vae.latent_store.format.layout import FLIP, TENSOR_NAMES, tensor_name
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.maintain.merge_split import StoredPiece
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors
from ldm_vae.latent_store.storage.objects import LocalFolder

CLIPS = False
LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that LightningDiT's shards cannot hold, one phrase each."""
    identity = manifest.identity
    lost = loses_of_moments(identity)
    if len({shard.shape for shard in manifest.shards}) > 1:
        raise UsageError(
            "--to: LightningDiT's reader takes latents of one shape; `store split --where bucket=HxW` gives them"
        )
    if FLIP not in identity.views:
        lost.append("the store has no mirrored view (`encode --views flip`): latents_flip holds the same as latents")
    if not _has_labels(manifest):
        lost.append("the store has no column label of integers: every label is 0")
    lost.append("keys, captions and other columns: its reader does not see them; they lie beside, as .parquet")
    return lost


def _has_labels(manifest: Manifest) -> bool:
    return manifest.columns.get("label", "").startswith(("int", "uint"))


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """A file of tensors and one of columns per shard."""
    identity = manifest.identity
    origin = manifest.model_copy(update={"identity": one_sample(identity), "shards": ()})
    write_carried(folder, Carried(manifest=origin, quarantine=tuple(read_quarantine(pieces[0].store))))
    digits = max(3, len(str(len(pieces) - 1)))  # its reader sorts by name
    for number, piece in enumerate(Progress(pieces, desc="convert", unit="shards", leave=False)):
        stem = folder / f"latents_rank00_shard{number:0{digits}d}"
        specs = [shards.TensorSpec(LABELS, "I64", ())]
        specs += [shards.TensorSpec(name, "F32", piece.shape) for name in (LATENTS, FLIPPED)]
        spool, rows = shards.Spool(folder, specs), []
        try:
            for tensors, samples in piece.read(np.arange(len(piece.keys))):
                z = draw(identity, tensors, samples)
                labels = [row.get("label") or 0 if _has_labels(manifest) else 0 for row in samples]
                spool.append({LABELS: np.array(labels, "<i8"), LATENTS: z[""], FLIPPED: z.get(FLIP, z[""])})
                rows += samples
            metadata = {"total_size": str(spool.rows), "dtype": "torch.float32"}
            shards.write_tensors(LocalFolder(stem.parent), stem.name, spool, None, metadata)
        finally:
            spool.close()
        shards.write_parquet(LocalFolder(stem.parent), stem.name, shards.to_table(rows))
    measured = LatentStatistics.from_json(manifest.statistics or {})
    stats = {"mean": measured.mean.float().view(1, -1, 1, 1), "std": measured.variance.sqrt().float().view(1, -1, 1, 1)}
    atomic_io.replace(folder / "latents_stats.pt", lambda file: torch.save(stats, file))


# --- back -------------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UsageError(f"SRC {path}: no .safetensors files there")
    return files


def carried(path: Path) -> Carried | None:
    """Read the store.json beside the shards."""
    _files(path)
    return read_carried(path if path.is_dir() else path.parent)


def read(path: Path, origin: Carried | Claim) -> Found:
    """Find one piece per file."""
    return found(path, origin, [_sketch(file, origin) for file in _files(path)])


def _sketch(path: Path, origin: Carried | Claim) -> Sketch:
    mapped = shards.map_tensors(path)
    latents = mapped.get(LATENTS)
    if latents is None or latents.ndim != 4 or not len(latents):
        raise WorkError(f"{path}: has no tensor {LATENTS} [N, c, h, w]; it has {', '.join(mapped)}")
    tensor, views = "sample", ["", FLIP] if FLIPPED in mapped else [""]
    if isinstance(origin, Carried):
        identity = origin.manifest.identity
        tensor, views = TENSOR_NAMES[identity.store][0], list(identity.views)
    places = {tensor_name(tensor, view): FLIPPED if view else LATENTS for view in views}
    for name in places.values():
        if name not in mapped or mapped[name].shape != latents.shape:
            raise WorkError(f"{path}: its tensor {name} is missing, or not of the shape of {LATENTS}")
    table = _columns(path, mapped, origin)
    keys = table.column("key").to_pylist()
    group = (
        origin.group(latents.shape[1:])
        if isinstance(origin, Claim)
        else group_of(table.slice(0, 1).to_pylist()[0], path)
    )

    def load(positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        mapped = shards.map_tensors(path)
        table = _columns(path, mapped, origin)
        for begin in range(0, len(positions), CHUNK_ROWS):
            some = positions[begin : begin + CHUNK_ROWS]
            samples = table.take(some).to_pylist()
            if isinstance(origin, Claim):
                samples = [origin.row(row.pop("key"), n, group, row) for n, row in zip(some, samples, strict=True)]
            yield {stored: mapped[name][some] for stored, name in places.items()}, samples

    dtypes = {stored: mapped[name].dtype for stored, name in places.items()}
    return Sketch(path, keys, latents.shape[1:], group, dtypes, load)


def _columns(path: Path, mapped: Tensors, origin: Carried | Claim) -> pa.Table:
    """The columns of a shard: those that lie beside it, or what a stranger's shard tells."""
    count = len(mapped[LATENTS])
    if isinstance(origin, Claim):
        labels = {"label": mapped[LABELS]} if LABELS in mapped and mapped[LABELS].shape == (count,) else {}
        return pa.table({"key": [f"{path.name}:{number}" for number in range(count)], **labels})
    try:
        table = shards.read_rows(path.with_suffix(""))
    except (OSError, pa.ArrowException) as error:
        raise WorkError(f"{path.with_suffix('.parquet')}: cannot be read: {error}") from error
    if table.num_rows != count or "key" not in table.column_names or table.column("key").type != pa.string():
        raise WorkError(f"{path.with_suffix('.parquet')}: is not the table of the {count} rows beside it")
    return table
