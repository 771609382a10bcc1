"""Names in a store: folders, files, tensors and views. docs/latent_store_format.md describes the same in prose.

A view is a crop and whether it is mirrored. The centre crop has no name; `flip` is its mirror image, `top_left` and
`top_left.flip` are a corner and its mirror image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

FORMAT = "ldm-vae latent store"
VERSION = 1

MANIFEST, QUARANTINE, PLAN = "manifest.json", "quarantine.jsonl", "plan.json"
SHARDS, UNITS = "shards", "units"  # folders
TENSORS, ROWS, MAPPED_ROWS = "safetensors", "parquet", "arrow"  # the files of a shard, by extension
EXTENSIONS = (TENSORS, ROWS, MAPPED_ROWS)

StoreKind = Literal["moments", "mean", "sample", "indices"]
StorageDtype = Literal["fp16", "fp32", "bf16", "uint16", "int32"]
ComputeDtype = Literal["no", "bf16", "fp16"]

SAFETENSORS_DTYPES: dict[StorageDtype, str] = {
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "uint16": "U16",
    "int32": "I32",
}
TENSOR_NAMES: dict[StoreKind, tuple[str, ...]] = {
    "moments": ("mean", "logvar"),
    "mean": ("mean",),
    "sample": ("sample",),
    "indices": ("indices",),  # of a VQModel's codebook [N, *p], of a quantizer beside a network [N, q, *p]
}
PIXELS = "pixels"
IMAGE_BYTES = "image_bytes"  # a column: the size of an image's bytes in its source
CLIP_FRAMES = "clip_frames"  # a column of clips: their frames
STATISTICS = "statistics"
OWN_COLUMNS = (
    *("key", "source", "source_index", "image_sha256", IMAGE_BYTES),
    *("original_size", "resolution", "bucket", "crop_box", CLIP_FRAMES),
)

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
FLIP = "flip"
VIEWS = ("", FLIP, *(view for corner in CORNERS for view in (corner, f"{corner}.{FLIP}")))


def shard_file(name: str, extension: str = "") -> str:
    """The name of a shard's file within its store; without an extension that of all its files."""
    return f"{SHARDS}/{name}.{extension}" if extension else f"{SHARDS}/{name}"


def shard_path(store: Path, name: str, extension: str = "") -> Path:
    """The path of a shard's file in a store on disk; without an extension the stem of all its files."""
    return store / shard_file(name, extension)


def tensor_name(tensor: str, view: str) -> str:
    """`mean` and `flip` => `mean.flip`."""
    return f"{tensor}.{view}" if view else tensor


def crop_of(view: str) -> str:
    """The crop that a view shows: `top_left.flip` => `top_left`, `flip` => the centre, which has no name."""
    return view.removesuffix(FLIP).removesuffix(".")


def is_flipped(view: str) -> bool:
    """True for a view that is a mirror image."""
    return view.endswith(FLIP)


def crops_of(views: tuple[str, ...]) -> tuple[str, ...]:
    """The crops that a set of views needs, each once, in order."""
    return tuple(dict.fromkeys(crop_of(view) for view in views))


def passed_on(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a source as a row has them: one that is called as one of ours is called `source_...`."""
    return {name if name not in OWN_COLUMNS else f"source_{name}": value for name, value in columns.items()}


def is_own(column: str) -> bool:
    """True for a column that the store itself adds to a row, False for one of the source."""
    return column in OWN_COLUMNS or column.startswith("crop_box.")
