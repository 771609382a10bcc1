"""Formats of other programs for latents, one file each; the file name is the name on the command line.

A format is a module with a constant and four functions:

    CLIPS                                         whether it holds latents [c, t, h, w]
    cannot_carry(manifest, options)               what it has no place for, one sentence each
    write(folder, manifest, pieces, options)      a store's rows => files in an empty folder
    carried(path)                                 what `write` left beside the latents, or None in a stranger's folder;
                                                  a UsageError of a format that is never read, which has no `read`
    read(path, told)                              => `Found`; told is what `carried` gave, or what the user claims
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.text import not_among
from ldm_vae.latent_store.convert.import_rows import Claim, ForeignPiece, Load
from ldm_vae.latent_store.convert.sidecar import Carried
from ldm_vae.latent_store.format.identity import LARGEST, Identity
from ldm_vae.latent_store.format.layout import (
    PIXELS,
    TENSOR_NAMES,
    VIEWS,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.publication import Group
from ldm_vae.latent_store.maintain.merge_split import StoredPiece


@dataclass(frozen=True)
class Options:
    """Options of a format beyond what the store itself says."""

    model: str | None = None
    """kohya, musubi, finetrainers: the diffusion model that the latents are for."""
    names: str = "sized"
    """kohya: how files and arrays are called, which is what a version of sd-scripts finds them by."""


@dataclass(frozen=True)
class Found:
    """Latents of another format: their pieces in order, and what was noticed on the way, one sentence each."""

    identity: Identity
    pieces: Sequence[ForeignPiece]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """Description of a file's latents before they are read; it becomes a piece once the identity is known."""

    where: object
    keys: Sequence[str]
    shape: tuple[int, ...]
    group: Group
    dtypes: Mapping[str, np.dtype[Any]]
    """Of its tensors, by the names that a store has for them."""
    load: Load


def found(path: Path, origin: Carried | Claim, sketches: Sequence[Sketch], notes: Sequence[str] = ()) -> Found:
    """Pieces of the identity that was carried, or of the one that fits what the user claims.

    Raises:
        UsageError: the latents have another number of channels than those of the VAE that is claimed.
        WorkError: there is nothing, or the files do not hold tensors of one kind and type.
    """
    if not sketches:
        raise WorkError(f"SRC {path}: no latents in it")
    for sketch in sketches:
        if len(sketch.shape) not in (2, 3, 4) or not all(0 < side < LARGEST for side in sketch.shape):
            raise WorkError(
                f"{sketch.where}: has arrays of the shape {list(sketch.shape)}, not latents [c, h, w] or [c, t, h, w]"
            )
    if isinstance(origin, Carried):
        identity = origin.manifest.identity
    else:
        kinds = {(tuple(sketch.dtypes), tuple(set(sketch.dtypes.values()))) for sketch in sketches}
        for sketch in sketches:
            origin.check_channels(sketch.where, sketch.shape)
        (names, dtypes), *others = kinds
        if others or len(dtypes) > 1:
            raise WorkError(f"SRC {path}: its files do not all hold the same tensors in one type")
        identity = origin.identity(names, dtypes[0], [sketch.group for sketch in sketches])
    for sketch in sketches:
        rank = len(sketch.shape) - identity.axes
        if rank not in (2, 3) or identity.codebooks not in (None, sketch.shape[0]):
            raise WorkError(f"{sketch.where}: has the shape {list(sketch.shape)}, which {identity.store} have not")
        if (rank == 3) != (len(sketch.group) == 4):
            raise WorkError(
                f"{sketch.where}: has latents {list(sketch.shape)}, and its rows say `clip_frames` otherwise"
            )
    pieces = [ForeignPiece(s.where, identity, s.keys, s.group, s.shape, s.load) for s in sketches]
    return Found(identity, pieces, tuple(notes))


def stored_name(name: str) -> str:
    """The store's name of a tensor; the `latents` of other programs are samples."""
    tensor, _, view = name.partition(".")
    return tensor_name("sample" if tensor == "latents" else tensor, view)


def is_tensor(name: str) -> bool:
    """True for the name of a column or member that holds latents or pixels."""
    tensor, _, view = name.partition(".")
    known = {"latents", PIXELS, *(name for names in TENSOR_NAMES.values() for name in names)}
    return tensor in known and view in VIEWS


class Format(Protocol):
    """The module of a format."""

    CLIPS: bool

    def cannot_carry(self, manifest: Manifest, options: Options) -> list[str]:
        """Raises UsageError when nothing of the store has a place in it."""

    def write(self, folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
        """Fill a folder that is given its name afterwards."""

    def carried(self, path: Path) -> Carried | None:
        """Raises UsageError when there is nothing of this format, WorkError when it is damaged."""

    def read(self, path: Path, origin: Carried | Claim) -> Found:
        """Raises WorkError for files that are damaged, or not what is told of them."""


def names() -> list[str]:
    """Names of all formats."""
    return config.options(__name__)


def load(name: str) -> Format:
    """A format by its name. Raises UsageError when there is none."""
    if name not in names():
        raise UsageError(f"format: {not_among(name, names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))
