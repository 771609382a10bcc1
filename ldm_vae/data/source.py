"""Source of images: a length, a stable key for every image, its bytes, and all other columns.

One file per kind of source in `ldm_vae.data.sources`; `open_source` tells which kind a path on a command line means.
Sources are lazy and picklable: nothing but the list of keys is held, a file is opened when its image is asked for.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field, field_validator

from ldm_vae.core import hub
from ldm_vae.core.config import Part, Section, choice, validate
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.paths import expanded, nearest_path
from ldm_vae.core.progress import Progress
from ldm_vae.core.text import an
from ldm_vae.data.decoding import EXTENSIONS, Decoding, RawImage
from ldm_vae.data.files import printable, repeated
from ldm_vae.data.flags import Resize
from ldm_vae.data.footage import Video
from ldm_vae.data.quarantine import BadImage


@dataclass(frozen=True)
class Record:
    """One image as its source holds it: key, image (bytes of a file, an array, or a Pillow image), other columns."""

    key: str
    image: RawImage
    columns: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Images by index. A source of one's own is any class with these five; its module is named by a dotted `kind`. With
    `facts` (`stamps.Stamped`) it need not be read to know that nothing has changed."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that every record carries."""

    @property
    def decoding(self) -> Decoding:
        """Decoding of its images (`Decoding()` if nothing is special)."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The stable, unique name of an image; costs no reading of the image."""

    def __getitem__(self, index: int) -> Record:
        """Raises BadImage when the image cannot be read."""


class Named:
    """Mixin of a source with a name: its line in an interpreter."""

    name: str
    counted = "images"

    def __len__(self) -> int:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {len(self):,} {self.counted})"


class SourceConfig(Part):
    """Knobs that every kind of source has; `data: {kind: folder, path: photographs}` in a training config."""

    path: str
    """Where the images are: a folder, file, glob or hub id, as the kind has it."""
    image_column: str | None = None
    """Column that holds the image (datasets, tar shards); by default the only one that can."""
    caption_column: str | None = None
    """Column that holds the caption; it is called `caption` from here on."""
    split: str = "train"
    """Split of a dataset."""
    max_bad: float = Field(1.0, ge=0.0, le=1.0)
    """Share of unusable images above which the work stops (1: never, with a warning above 1 %)."""
    channels: int = Field(3, ge=1, le=2**16)
    """Channels of the decoded images: 1 (grey), 3 (RGB), 4 (RGBA, see `alpha`); any number for .npy files and array
    columns."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels, 0 to 255 each."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white; by default those of the number type: uint8, uint16, floats in [0, 1], bool.
    Any other needs it."""
    alpha: bool = False
    """The fourth of four channels is straight alpha: images without one are opaque, resizing does not mix in invisible
    colour, and losses and metrics see composites. Without it, four channels are alike."""
    frames: int | None = Field(None, gt=0)
    """Frames of a clip: videos are read as clips of so many, images as clips of one. Without it, images alone are."""
    frame_rate: float | None = Field(None, gt=0.0, le=1000.0)
    """Frames a second of a clip, by the time stamps of the video; by default the video's own."""
    frame_stride: int = Field(1, gt=0)
    """Take every so many frames of those."""
    sample_rate: int | None = Field(None, gt=0, le=2**20)
    """Samples a second of sounds, to which they are resampled; without it there are none. `channels` 1 mixes to mono,
    2 gives mono to both."""
    samples: int | None = Field(None, gt=0)
    """Samples of an excerpt of a sound: in training it starts anywhere, else excerpts cover a sound one after the
    other."""
    jpeg_draft: bool = False
    """Decode JPEG at 1/2, 1/4 or 1/8 of its size where that is enough: faster, and some 50 dB off. Training only; a
    store made with it says so in its identity."""
    holdout: float | None = Field(None, gt=0, lt=1)
    """Share of the images that is validated on and not trained on, in the place of validation_data; a hash of each key
    decides. Training only; the verbs have `--part`."""
    holdout_copies: Literal["leave_out", "keep"] = "leave_out"
    """With holdout, training images that are copies of held-out ones (other sizes, other formats): left out, for which
    every image is decoded once when the run begins, or trained on."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if not path:
            raise ValueError("expected a folder, file or hub id, got an empty string")
        return path

    def decoding(self) -> Decoding:
        """The knobs that change pixels."""
        return Decoding(
            self.channels, self.background, self.value_range, self.jpeg_draft, alpha=self.alpha, frames=self.frames,
            frame_rate=self.frame_rate, frame_stride=self.frame_stride, sample_rate=self.sample_rate,
            samples=self.samples,
        )  # fmt: skip

    def absent(self, expected: str) -> UsageError:
        """The error where `path` is not what this kind reads, with the kind that reads it."""
        place = expanded(self.path)
        found = "a folder" if place.is_dir() else "another file" if place.exists() else "nothing there"
        found += nearest_path(place)
        hint = ""
        if place.exists():
            with contextlib.suppress(UsageError, OSError):
                hint = f"; `kind: {kind_of(self.path)}` reads it" if kind_of(self.path) != self.kind else ""
        elif matches := glob.glob(str(place)):
            hint = f"; as a pattern it means {len(matches)} files, which `kind: webdataset` reads of tars alone"
        return UsageError(f"data.path {self.path}: expected {expected}, found {found}{hint}")

    def build(self) -> Source:
        """Open the source. Raises UsageError when nothing is there, WorkError when it is empty."""
        raise NotImplementedError


class _Chosen(Section):
    data: choice("ldm_vae.data.sources")  # type: ignore[valid-type]


def open_source(
    path: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    kind: str | None = None,
    **knobs: Any,
) -> Source:
    """Open DATA of a command line as a source of the kind that its path means.

    A folder of images; a zip; a list file of paths or URLs (.txt, .lst); parquet or arrow files, or a folder of them; a
    folder written by `save_to_disk`; tar shards (file, folder, glob or braces); a hub id `owner/name`. Of these, at a
    URL too: list files, parquet files, tar shards, and a folder of images, where its server lists it.

    Args:
        kind: one of the files in `ldm_vae.data.sources`, or the dotted path of your own module; found by looking at
            `path` if None.
        knobs: any other field of the kind's Config (`channels=1`).

    Raises:
        UsageError: nothing is there, it is none of these, or a knob is unknown, of no such value or for training.
        WorkError: it holds no image.
    """
    if asked := [name for name in ("holdout", "holdout_copies") if name in knobs]:
        raise UsageError(f"data.{asked[0]}: is for training; of DATA, `--part holdout` takes what a training held out")
    fields = {"image_column": image_column, "caption_column": caption_column, "split": split} | knobs
    # a source of somebody's own need not have our fields: it gets those that say something
    known = SourceConfig.model_fields
    given = {name: value for name, value in fields.items() if name not in known or value != known[name].default}
    chosen = validate(_Chosen, {"data": {"kind": kind or kind_of(str(path)), "path": str(path)} | given}, str(path))
    source: Source = chosen.data.build()
    return source


SourceType = TypeVar("SourceType", bound="Images")


class Images(Protocol):
    """A source or a stream."""

    @property
    def decoding(self) -> Decoding: ...


def with_resize(source: SourceType, resize: Resize) -> SourceType:
    """The same images, whole ones brought to a resolution in this way.

    Raises:
        UsageError: a source of somebody's own whose `decoding` cannot be set, and names another.
    """
    if source.decoding.resize == resize:
        return source
    changed = copy(source)
    try:
        changed.decoding = replace(source.decoding, resize=resize)  # type: ignore[misc]
    except AttributeError as error:
        raise UsageError(
            f"resize: expected {resize}, and the decoding of {an(type(source).__name__)} cannot be set; its own "
            "`decoding` must say it"
        ) from error
    return changed


def kind_of(path: str) -> str:
    """The kind of source that `path` is, by what lies there. Raises UsageError when nothing does."""
    # a pattern of shards is no file; a file with such a name is one
    if "://" in path and ".tar" not in path:
        return "hub" if path.endswith(".parquet") else "list"
    if "://" in path or (".tar" in path and not Path(path).exists() and re.search(r"[*?{\[]", path)):
        return "webdataset"
    place = expanded(path)
    if place.is_dir():
        return _kind_of_folder(place)
    if place.is_file():
        kinds = {
            ".zip": "zip",
            ".tar": "webdataset",
            ".parquet": "hub",
            ".arrow": "hub",
            ".txt": "list",
            ".lst": "list",
        }
        if place.suffix.lower() not in kinds:
            raise UsageError(f"data {path}: expected a folder, a hub id or a file of {', '.join(kinds)}")
        return kinds[place.suffix.lower()]
    hub.check_id(path, f"data {path}")
    return "hub"


def _kind_of_folder(place: Path) -> str:
    if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "hub"  # written by datasets' save_to_disk
    names = [name for name in os.listdir(place) if not name.startswith(".") and name != "metadata.parquet"]

    def first(endings: Collection[str]) -> str | None:
        there = (name for name in names if os.path.splitext(name)[1].lower() in endings)
        return next((name for name in there if os.path.isfile(place / name)), None)

    image = first(EXTENSIONS)
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "hub"), (".arrow", "hub")):
        other = first({suffix})
        if other and image:
            raise UsageError(
                f"data {place}: holds images ({image}) and {suffix} files ({other}); --kind folder or --kind {kind} "
                "decides, or the path of the files themselves"
            )
        if other:
            return kind
    return "folder"


def image_checksum(image: RawImage) -> str:
    """SHA-256 of an image as the source holds it: the bytes of its file, or shape, type and values of an array."""
    if isinstance(image, Video):
        return image.checksum()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    array = np.ascontiguousarray(np.asarray(image))
    return hashlib.sha256(f"{array.shape}{array.dtype.str}".encode() + array.tobytes()).hexdigest()


def image_bytes(image: RawImage) -> int:
    """Bytes of an image as the source holds it: of its file, or of the values of an array."""
    if isinstance(image, Video):
        return image.bytes
    return len(image) if isinstance(image, bytes) else int(np.asarray(image).nbytes)


def checksum(source: Source, indices: Iterator[int] | range | None = None) -> str:
    """SHA-256 over keys and images of a source, in its order; an unreadable image counts with its key and as such."""
    digest = hashlib.sha256()
    chosen = range(len(source)) if indices is None else indices
    for index in Progress(chosen, desc="checksum", unit="images", leave=False):
        try:
            record = source[index]
            digest.update(f"{record.key}\n{image_checksum(record.image)}\n".encode("utf-8", "surrogateescape"))
        except BadImage:
            digest.update(f"{source.key(index)}\nunreadable\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def each_key(source: Source) -> Iterator[str]:
    """Keys in the order of the source, to be taken to their end: a class of somebody's own may promise too much.

    Raises:
        UsageError: a key that is no text, or, behind the last, one that two images have.
    """
    hashes = np.empty(len(source), np.int64)
    for index in range(len(source)):
        key = source.key(index)
        if not isinstance(key, str):
            raise UsageError(f"data: key({index}) of {type(source).__name__}: expected text, got {key!r:.60}")
        hashes[index] = hash(key)
        yield key
    if (twice := repeated(hashes, source.key)) is not None:
        raise UsageError(
            f"data: key of {type(source).__name__}: expected keys that differ, got {printable(twice)} twice"
        )


def not_empty(source: Any, path: str, what: str) -> None:
    """Raises WorkError for a source without a single image."""
    if len(source) == 0:
        raise WorkError(f"data {path}: holds no {what}")
