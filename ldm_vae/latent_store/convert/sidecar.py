"""Sidecar of a converted store: its identity, its columns as JSON, and one sample of each posterior.

Legend: n rows, c latent channels, h w latent positions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core import atomic_io, rng
from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import check_text
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    FLIP,
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.work_units import BadSample
from ldm_vae.latent_store.maintain.repack import Samples, Tensors

STORE_JSON = "store.json"
MOST_JSON = 1 << 28  # bytes of JSON that are read at once
BYTES = "__base64__"


class Carried(Section):
    """A store's manifest without its shards, and its quarantine: what makes latents of another format a store again."""

    manifest: Manifest
    quarantine: tuple[BadSample, ...] = ()

    @property
    def normalisation(self) -> Normalisation:
        """The one that its VAE's config names."""
        return self.manifest.normalisation


def parse_carried(text: str | bytes, where: object) -> Carried:
    """Parse JSON. Raises WorkError when it is not what `Carried` says."""
    try:
        return Carried.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise WorkError(f"{where}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error


def write_carried(folder: Path, carried: Carried) -> None:
    """Write FOLDER/store.json."""
    atomic_io.replace(folder / STORE_JSON, atomic_io.data(carried.model_dump_json(indent=1).encode() + b"\n"))


def read_carried(folder: Path) -> Carried | None:
    """Read FOLDER/store.json; None when there is none. Raises WorkError when it is damaged."""
    path = folder / STORE_JSON
    if not path.is_file():
        return None
    try:
        content = read_bytes(path, MOST_JSON)
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error}") from error
    return parse_carried(content, path)


def read_carried_tree(path: Path) -> Carried | None:
    """Read the store.json at the top of a tree of files. Raises UsageError where there is no tree."""
    if not path.is_dir():
        raise UsageError(f"SRC {path}: expected the folder of a latents cache")
    return read_carried(path)


def as_numbers(identity: Identity, tensors: Tensors) -> Tensors:
    """Tensors as other programs can hold them: bf16, which numpy has not, as float32, which holds it exactly."""
    dtype = SAFETENSORS_DTYPES[identity.dtype]
    return {
        name: value if value.dtype == np.uint8 else shards.to_float(value, dtype) for name, value in tensors.items()
    }


def one_sample(identity: Identity) -> Identity:
    """The identity of what `draw` gives: centre crop and mirror image; moments become one sample each, in fp32."""
    views = tuple(view for view in identity.views if view in ("", FLIP))
    changes: dict[str, Any] = {"views": views, "pixels": False}
    if identity.store == "moments":
        changes |= {"store": "sample", "dtype": "fp32"}
    return identity.model_copy(update=changes)


def draw(identity: Identity, tensors: Tensors, samples: Samples) -> dict[str, npt.NDArray[np.float32]]:
    """By view, z [n, c, h, w] fp32 for programs that keep one sample of each image: the sample or mean that a store
    has, of moments a sample whose noise is keyed by the image's key, so that it comes out the same each time."""
    numbers = as_numbers(identity, tensors)
    drawn = {}
    for number, view in enumerate(one_sample(identity).views):
        z = torch.from_numpy(numbers[tensor_name(TENSOR_NAMES[identity.store][0], view)].astype(np.float32))
        if identity.store == "moments":
            logvar = torch.from_numpy(numbers[tensor_name("logvar", view)].astype(np.float32))
            # by the image's key, not by its place: the same sample whatever store it comes from
            keys = [(_number(row["key"]), int(row.get("resolution") or 0), number) for row in samples]
            z = Moments(z, logvar).sample(rng.normal(0, "converted sample", keys, z.shape[1:]))
        drawn[view] = z.numpy()
    return drawn


def row_to_json(row: Mapping[str, Any]) -> bytes:
    """Columns as JSON: bytes in base64, times and decimal numbers as text."""
    return json.dumps(row, ensure_ascii=False, default=_as_json).encode()


def _as_json(value: Any) -> Any:
    return {BYTES: base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def row_from_json(data: bytes) -> dict[str, Any]:
    """Parse what `row_to_json` wrote. Raises ValueError when it is not an object."""
    try:
        row = json.loads(data, object_hook=_from_json)
        check_text(row)
    except TypeError as error:
        raise ValueError(f"{BYTES} holds something else than text") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row


def _from_json(tree: dict[str, Any]) -> Any:
    return base64.b64decode(tree[BYTES]) if tree.keys() == {BYTES} else tree


def becomes_text(manifest: Manifest) -> list[str]:
    """Describe the columns whose values JSON holds only as text."""
    odd = [name for name, kind in manifest.columns.items() if re.search("timestamp|date|time|duration|decimal", kind)]
    return [f"times and decimal numbers: the values of {', '.join(odd)} become text"] if odd else []


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def loses_of_moments(identity: Identity) -> list[str]:
    """Parts of a store that a format with one sample per image cannot hold. Raises UsageError for indices."""
    if identity.store == "indices":
        raise UsageError("--to: the store holds indices of codes, which this format has no place for")
    lost = []
    if identity.store == "moments":
        lost.append("logvar: one sample of each posterior is kept, so training sees the same noise in every epoch")
    dropped = [view for view in identity.views if view not in ("", FLIP)]
    if dropped:
        lost.append(f"the views {', '.join(dropped)}: there is a place for the image and its mirror image only")
    if identity.pixels:
        lost.append("the stored pixels")
    return lost
