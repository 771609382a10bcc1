"""Rows of other formats on their way into a store: values checked one by one, and what a user claims of such latents.

Nothing in a stranger's file is believed: a value that no store may hold (NaN, an index beyond the codebook) ends the
conversion in one sentence.

Legend: n rows, c latent channels, T frames, t latent frames, h w latent positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    CLIP_FRAMES,
    PIXELS,
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    passed_on,
    tensor_name,
)
from ldm_vae.latent_store.format.publication import Group
from ldm_vae.latent_store.format.rows import tensors_of
from ldm_vae.latent_store.maintain.repack import Integers, Samples, Tensors

CHECKSUM = re.compile("[0-9a-f]{64}")
BUCKET = re.compile("([0-9]{1,8})x([0-9]{1,8})")
UNKNOWN = "unknown"  # preprocessing of latents that another program made: equal to none of ours

Load = Callable[[Integers], Iterator[tuple[Tensors, Samples]]]


@dataclass(frozen=True)
class ForeignPiece:
    """Rows of a file in another format. `load` gives the rows at ascending positions as numbers; they are checked here
    and become what a store of this identity holds."""

    where: object
    identity: Identity
    keys: Sequence[str]
    group: Group
    shape: tuple[int, ...]
    load: Load

    def check(self) -> None:
        """Other formats have no checksums: values are looked at when they are read."""

    def read(self, positions: Integers) -> Iterator[tuple[Tensors, Samples]]:
        """Yield the rows in storage dtype. Raises WorkError for a row that no store may hold."""
        first = 0
        for tensors, samples in self.load(positions):
            for position, row in zip(positions[first : first + len(samples)].tolist(), samples, strict=True):
                # the row must be of the sample that was announced: pieces are dealt by these keys
                checksum = row.get("image_sha256")
                if row.get("key") != self.keys[position] or not (checksum is None or CHECKSUM.fullmatch(str(checksum))):
                    raise WorkError(f"{self.where}: the row of {self.keys[position]} is damaged: its key or checksum")
            first += len(samples)
            yield {name: self._stored(name, tensors, samples) for name in tensors_of(self.identity)}, samples

    def _stored(self, name: str, tensors: Tensors, samples: Samples) -> npt.NDArray[Any]:
        values = tensors.get(name)
        pixels = name.split(".")[0] == PIXELS
        _, height, width, *frames = self.group
        shape = self.shape if values is None or not pixels else (*values.shape[1:2], *frames, height, width)
        # shapes before values: a wrong one would make the checks below meaningless
        if values is None or values.shape != (len(samples), *shape):
            found = "is missing" if values is None else f"has the shape {values.shape[1:]}, not {shape}"
            raise WorkError(f"{self.where}: {name} of {samples[0]['key']} {found}")
        kinds = "u" if pixels else "iu" if self.identity.codes is not None else "f"
        if values.dtype.kind not in kinds or (pixels and values.dtype != np.uint8):
            raise WorkError(f"{self.where}: {name} has values of type {values.dtype}")
        if pixels:
            return values
        # an index beyond the codebook would be read out of another row, or of none
        if self.identity.codes is not None:
            good = (values >= 0) & (values < self.identity.codes)
            what = f"an index outside of the {self.identity.codes:,} codes"
        else:
            values = _rounded(values, self.identity.dtype)
            good = np.isfinite(shards.to_float(values, SAFETENSORS_DTYPES[self.identity.dtype]))
            what = f"NaN, infinity, or a value that {self.identity.dtype} cannot hold"
        if not good.all():
            first = int(np.flatnonzero(~good.reshape(len(samples), -1).all(axis=1))[0])
            raise WorkError(f"{self.where}: {name} of {samples[first]['key']} holds {what}")
        return values.astype(shards.STORAGE[SAFETENSORS_DTYPES[self.identity.dtype]], copy=False)


def _rounded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype == "bf16":
        return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    with np.errstate(over="ignore"):  # infinity is found by the caller
        return values.astype("<f2" if dtype == "fp16" else "<f4", copy=False)


def group_of(row: dict[str, Any], where: object) -> Group:
    """Resolution and size of the crop, and of a clip its frames, as a store's row says them."""
    try:
        height, width = map(int, str(row["bucket"]).split("x"))
        frames = [] if row.get(CLIP_FRAMES) is None else [int(row[CLIP_FRAMES])]
        if min(group := (int(row["resolution"]), height, width, *frames)) < 1:
            raise ValueError("not positive")
        return group
    except (KeyError, TypeError, ValueError) as error:
        raise WorkError(f"{where}: a row does not say its resolution and bucket") from error


def original_size(row: Mapping[str, Any]) -> list[int] | None:
    """Height and width of a row's image; None where they are not known, or no such thing."""
    size = row.get("original_size")
    good = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    return size if good else None


@dataclass(frozen=True)
class Claim:
    """The user's statement about latents that carry no identity: the VAE that made them. Unknown fields stay
    unknown."""

    encoder: str
    """SHA-256 of its encoder."""
    factor: int
    """Its f: pixels per latent position."""
    channels: int
    """Of its latents."""
    codes: int | None
    """Rows of its codebook."""
    source: str
    """Where the latents were found."""
    shard_size: int
    normalisation: Normalisation
    """The one that its config names."""
    frames_of: Callable[[int], int]
    """t => T of its clips. Raises UsageError for a t that no clip has."""

    def group(self, shape: Sequence[int]) -> Group:
        """Resolution and size of crops whose latents have this shape [c, h, w], or [h, w] of codes; of clips, whose
        latents are [c, t, h, w], their frames too.

        Raises:
            UsageError: no clip of the VAE has so many latent frames.
        """
        height, width = (int(side) * self.factor for side in shape[-2:])
        frames = [self.frames_of(int(shape[1]))] if len(shape) == 4 else []
        return round(math.sqrt(height * width)), height, width, *frames

    def check_channels(self, where: object, shape: Sequence[int]) -> None:
        """Raises UsageError unless latents of this shape (c, h, w) or (c, t, h, w), or indices (h, w), can be of this
        VAE."""
        if len(shape) > 2 and shape[0] != self.channels:
            raise UsageError(
                f"--vae: the latents in {where} have {shape[0]} channels and those of this VAE {self.channels}; name "
                "the VAE that made them"
            )

    def check_crop(self, key: str, group: Group, crop: tuple[float, float], slack: float = 0) -> None:
        """Raises UsageError unless a crop of these sides (height, width), which the latents name as theirs, gives
        latents of such a size; slack: pixels that it may be smaller, by the rounding of another program."""
        sides = group[1:3]
        if not all(0 <= side - said <= slack for side, said in zip(sides, crop, strict=True)):
            height, width = (side // self.factor for side in sides)
            raise UsageError(
                f"--vae: the latents of {key} are {height}x{width}, of {crop[0]:g}x{crop[1]:g} pixels, and this VAE "
                f"has f = {self.factor}; name the VAE that made them"
            )

    def row(self, key: str, index: int, group: Group, more: dict[str, Any]) -> dict[str, Any]:
        """A row of an image of which little is known: no checksum is invented for it.

        Raises:
            UsageError: its bucket is that of a VAE of another f.
        """
        resolution, height, width, *frames = group
        if (bucket := BUCKET.fullmatch(str(more.get("bucket")))) is not None:
            one, other = (int(side) for side in bucket.groups())  # ours is HxW, some write WxH
            self.check_crop(key, group, (other, one) if (other, one) == (height, width) else (one, other))
        own = {"key": key, "source": self.source, "source_index": index, "image_sha256": None}
        own |= {"resolution": resolution, "bucket": f"{height}x{width}"}
        own |= {CLIP_FRAMES: frames[0]} if frames else {}
        if (size := original_size(more)) is not None:
            own["original_size"] = size
            more = {name: value for name, value in more.items() if name != "original_size"}
        return own | passed_on(more)

    def identity(self, tensors: Sequence[str], dtype: np.dtype[Any], groups: Sequence[Group]) -> Identity:
        """That of a store of these tensors (`latents` are samples). Raises WorkError when there is no such store."""
        views = tuple(sorted({name.partition(".")[2] for name in tensors}))  # the centre crop first
        kind = next(
            (
                kind
                for kind, names in TENSOR_NAMES.items()
                if {tensor_name(name, view) for name in names for view in views} == set(tensors)
            ),
            None,
        )
        storage = {"e": "fp16", "f": "fp32", "d": "fp32", "H": "uint16", "i": "int32"}.get(dtype.char)
        if kind is None or views[0] or storage is None or (kind == "indices") != (dtype.kind in "iu"):
            raise WorkError(f"{self.source}: tensors {', '.join(tensors)} of type {dtype} are not those of a store")
        if kind == "indices" and self.codes is None:
            raise WorkError(f"{self.source}: {kind} are not what this VAE gives")
        squares = all(height == width for _, height, width, *_ in groups)
        return Identity.model_validate(
            {
                "encoder": self.encoder,
                "preprocessing": UNKNOWN,
                "resolution": tuple(sorted({group[0] for group in groups})),
                "store": kind,
                "dtype": storage,
                "mixed_precision": "no",
                "shard_size": self.shard_size,
                "views": views,
                "bucket_step": None if squares else self.factor,
                "codes": self.codes if kind == "indices" else None,
            }
        )
