"""Any Hugging Face dataset: a hub id, a folder written by `save_to_disk`, parquet or arrow files.

Memory-mapped by `datasets`, decoded by us: the image column is read as raw bytes. The key is the row number.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from pydantic import Field, model_validator

from ldm_vae.core import hub
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.paths import expanded, nearest_path
from ldm_vae.core.text import an
from ldm_vae.core.validation import disguised_file
from ldm_vae.data.decoding import DEFAULT, Decoding, RawImage
from ldm_vae.data.files import is_url, read_bytes
from ldm_vae.data.footage import Video, is_footage
from ldm_vae.data.metadata import rename_caption
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.ranges import FIELD, own_range
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts
from ldm_vae.data.stream import InOrderOnly


class Config(SourceConfig):
    """`data: {kind: hub, path: owner/name, image_column: image, split: train}`; `path` may be local files too."""

    kind: str = "hub"
    name: str | None = None
    """Configuration of a dataset that has several."""
    revision: str | None = None
    """Commit, tag or branch of a dataset on the hub."""
    streaming: bool = False
    """Read over the network in order, nothing is downloaded first (ldm_vae/data/stream.py says what that costs)."""
    shuffle_buffer: int = Field(1000, ge=0)
    """With streaming, images among which training shuffles; held as files, undecoded."""

    @model_validator(mode="after")
    def _check_split(self) -> Config:
        if not self.split:
            raise ValueError("split: expected a name such as train, got an empty string")
        return self

    def build(self) -> HubSource | HubStream:
        if is_url(self.path):
            if self.streaming:
                raise UsageError(
                    f"data.streaming: is of a dataset on the hub; the files of {self.path} are read by row"
                )
            from ldm_vae.data.remote_tables import RemoteTable  # fsspec, which files have no need of

            return HubSource(
                RemoteTable(_urls(self.path)), self.decoding(), self.image_column, self.caption_column, self.path
            )
        dataset = load(self)
        if self.streaming:
            return HubStream(dataset, self)
        source = HubSource(dataset, self.decoding(), self.image_column, self.caption_column, self.path)
        not_empty(source, self.path, "image")
        return source


class HubSource(Named):
    """Rows of a `datasets.Dataset`."""

    def __init__(
        self, dataset: Any, decoding: Decoding, image_column: str | None, caption_column: str | None, name: str = ""
    ) -> None:
        self.decoding = decoding
        self.name = name
        self.image_column = find_image_column(dataset, image_column, name, decoding)
        self._captions = check_caption_column(dataset, caption_column, name)
        self._dataset = undecoded(dataset)
        self._dtype = declared_dtype(dataset, self.image_column)
        check_dtype(self._dtype, decoding, self.image_column, name, self._dataset)
        self._facts = dataset.facts if is_url(name) else _facts_of(dataset, self.image_column)
        others = [column for column in dataset.column_names if column != self.image_column]
        self.columns: tuple[str, ...] = tuple(rename_caption(dict.fromkeys(others), caption_column))

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, index: int) -> str:
        return row_key(index)

    def __getitem__(self, index: int) -> Record:
        try:
            row = dict(self._dataset[int(index)])
        except WorkError:  # a server that does not answer says nothing of the row
            raise
        except Exception as error:  # a damaged arrow file: any of pyarrow's, or OSError
            raise BadImage(f"row cannot be read: {error}") from error
        image = row.pop(self.image_column)
        return Record(row_key(index), as_image(image, self._dtype), rename_caption(row, self._captions))

    def facts(self, index: int) -> Facts | None:
        return self._facts and self._facts._replace(identity=(*self._facts.identity, index))


def _facts_of(dataset: Any, column: str) -> Facts | None:
    """Facts of the files that the table is mapped from, as they were when it was opened; None when they do not hold
    all."""
    known = [file_facts(file["filename"]) for file in dataset.cache_files]
    facts = [each for each in known if each is not None]
    # a table in memory, or of files that cannot be asked: only the images themselves can tell
    if not facts or len(facts) < len(known) or not _holds_bytes(dataset, column):
        return None
    return Facts(-1, max(each.changed for each in facts), (hash(tuple(each.identity for each in facts)),))


def _holds_bytes(dataset: Any, column: str) -> bool:
    """True when all images lie in the table; a path leads to a file that the table knows nothing of."""
    import pyarrow as pa

    for chunk in dataset.data.column(column).chunks:
        stored = getattr(chunk, "storage", chunk)
        if pa.types.is_struct(stored.type):
            # a row without bytes has a path, and the file there may change without the table
            if stored.type.get_field_index("bytes") < 0 or stored.field("bytes").null_count:
                return False
        elif pa.types.is_string(stored.type) or pa.types.is_large_string(stored.type):
            return False
    return True


def row_key(index: int) -> str:
    """The key of a row: its number, so that sorting keys keeps the order."""
    return f"{index:09d}"


class HubStream(InOrderOnly):
    """Rows of a `datasets.IterableDataset`."""

    def __init__(self, dataset: Any, config: Config) -> None:
        self.name = config.path
        self.decoding = config.decoding()
        self.shuffle_buffer = config.shuffle_buffer
        self.image_column = find_image_column(dataset, config.image_column, config.path, self.decoding)
        self._captions = check_caption_column(dataset, config.caption_column, config.path)
        self._dataset = undecoded(dataset)
        self._dtype = declared_dtype(dataset, self.image_column)
        check_dtype(self._dtype, self.decoding, self.image_column, self.name, ())
        others = [column for column in dataset.features or {} if column != self.image_column]
        self.columns: tuple[str, ...] = tuple(rename_caption(dict.fromkeys(others), self._captions))

    def __iter__(self) -> Iterator[Record | Bad]:
        for index, row in enumerate(self._rows()):
            others = {name: value for name, value in row.items() if name != self.image_column}
            try:
                image = as_image(row.get(self.image_column), self._dtype)
            except BadImage as error:
                yield Bad(row_key(index), error.reason)
                continue
            yield Record(row_key(index), image, rename_caption(others, self._captions))

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._dataset
        except Exception as error:  # the network and the server: any kind
            raise WorkError(f"data {self.name}: the stream broke: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return (re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__)[:300]


def load(config: Config) -> Any:
    """The dataset that a config means. Raises UsageError with one sentence for whatever `datasets` raises."""
    import datasets

    path, silent = expanded(config.path), None
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = _pick_split(loaded, config) if isinstance(loaded, Mapping) else loaded
            return loaded.to_iterable_dataset() if config.streaming else loaded
        files = _files(path)
        if files:
            builder = "parquet" if files[0].endswith(".parquet") else "arrow"
            return datasets.load_dataset(
                builder, name=_as_they_are(files), data_files=files, split="train", streaming=config.streaming
            )
        if path.exists():
            raise UsageError(
                f"data.path {config.path}: expected a hub id, parquet or arrow files, or a save_to_disk folder"
            )
        hub.check_id(config.path, f"data.path {config.path}")
        silent = hub.connect()
        return datasets.load_dataset(
            config.path, config.name, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except UsageError:
        raise
    except Exception as error:  # the hub, the network, the builder: dozens of types
        # a local file that is something else than its name says is the likelier reason
        for file in _files(path):
            if (what := disguised_file(Path(file))) is not None:
                raise UsageError(f"data {config.path}: {Path(file).name} {what}") from error
        said = f"{_one_line(error)}{nearest_path(path)}" if silent is None else hub.failure(error, config.path, silent)
        raise UsageError(f"data {config.path} (split {config.split}): cannot be loaded: {said}") from error


def _as_they_are(files: Sequence[str]) -> str:
    """A name for files as they are now. `datasets` (5.2.0) converts a file once and takes the copy as long as path and
    mtime are the same, which `cp -p` and `rsync -a` make of another file."""
    found = [os.stat(file) for file in files]
    identity = [(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]
    return f"files-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def _pick_split(splits: Mapping[str, Any], config: Config) -> Any:
    if config.split not in splits:
        raise UsageError(f"data.split {config.split}: {config.path} has {', '.join(splits)}")
    return splits[config.split]


def _urls(url: str) -> list[str]:
    """The parquet files that a URL means: with `*`, those of its folder that match. Raises UsageError for none."""
    from ldm_vae.core import fsspec_files

    folder, _, pattern = url.rpartition("/")
    if "*" not in pattern:
        return [url]
    found = sorted(f"{folder}/{name}" for name in fnmatch.filter(fsspec_files.listed(folder), pattern))
    if not found:
        raise UsageError(f"data {url}: no such file")
    return found


def _files(path: Path) -> list[str]:
    """Parquet or arrow files that a path means: the file itself, those in a folder, those of a glob."""
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return sorted(map(str, path.glob("**/*.parquet"))) or sorted(map(str, path.glob("**/*.arrow")))
    if any(character in str(path) for character in "*?["):
        return sorted(map(str, path.parent.glob(path.name)))
    return []


def find_image_column(dataset: Any, image_column: str | None, name: str, decoding: Decoding = DEFAULT) -> str:
    """The column that holds the images, or with `decoding.frames` the videos, with `decoding.sample_rate` the sounds.
    Raises UsageError where it is not there, or there are several."""
    features: dict[str, Any] = dict(dataset.features or {})
    if image_column is not None:
        if features and image_column not in features:
            raise UsageError(f"data.image_column {image_column}: {name} has {', '.join(features)}")
        return image_column
    if decoding.signal != "image":
        usual = decoding.signal
        these = [column for column, feature in features.items() if type(feature).__name__ == usual.capitalize()]
        if len(these) == 1 or usual in (these or features):
            return usual if usual in (these or features) else these[0]
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    # the usual name, also where a stream declares no features; not where it is text (a path) beside real images
    if not features or "image" in (images or features):
        return "image"
    if len(images) == 1 and "image" not in features:
        return images[0]
    told = ", ".join({**dict.fromkeys(images), **({"image": None} if "image" in features else {})} or features)
    raise UsageError(f"data.image_column: which column of {name} holds the images? It has {told}")


def check_caption_column(dataset: Any, caption_column: str | None, name: str) -> str | None:
    """Raises UsageError when the caption column is not there."""
    if caption_column is not None and dataset.features and caption_column not in dataset.features:
        raise UsageError(f"data.caption_column {caption_column}: {name} has {', '.join(dataset.features)}")
    return caption_column


def undecoded(dataset: Any) -> Any:
    """The same dataset as it is stored: image columns as bytes, whatever format the dataset remembers (that of numpy
    makes an int64 of every integer)."""
    dataset = dataset.with_format(None)
    for column, feature in dict(dataset.features or {}).items():
        if type(feature).__name__ in ("Image", "Video", "Audio") and feature.decode:
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return dataset


_NUMBERS = frozenset({"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float16",
                      "float32", "float64"})  # fmt: skip


def declared_dtype(dataset: Any, column: str) -> np.dtype[Any] | None:
    """The number type that a column of arrays or lists declares; None of any other column, and where nothing does."""
    feature = (dataset.features or {}).get(column)
    is_array = hasattr(feature, "shape")  # Array2D, Array3D
    while (inner := feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)) is not None:
        # nested lists: the innermost feature has the number type
        feature, is_array = inner, True
    name = getattr(feature, "dtype", None)
    return np.dtype(name) if is_array and name in _NUMBERS else None


def check_dtype(dtype: np.dtype[Any] | None, decoding: Decoding, column: str, name: str, rows: Any) -> None:
    """Raises UsageError for a column of numbers without a range of their own, before all its images are refused; rows
    to look at, none of a stream."""
    if dtype is None or own_range(dtype) is not None or decoding.value_range is not None:
        return
    spans = ""
    with contextlib.suppress(Exception):  # a damaged first row is no reason to say less about the column
        first = np.asarray(next(iter(rows))[column], dtype)
        spans = f", the first spans [{first.min()}, {first.max()}]"
    raise UsageError(
        f"{FIELD}: expected the two values that become black and white, since the images in column {column} of {name} "
        f"are {dtype}, which does not say it{spans}"
    )


def as_image(value: Any, dtype: np.dtype[Any] | None = None) -> RawImage:
    """An image column's value => an image for `decode`; dtype: the type that the column declares. Raises BadImage."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return Video(os.fspath(value)) if is_footage(os.fspath(value)) else read_bytes(value)
    if isinstance(value, PillowImage.Image):
        return value
    if isinstance(value, list | np.ndarray):
        try:
            return np.asarray(value, dtype)
        except ValueError as error:
            raise BadImage("a list of lists of different lengths is not an image") from error
        except TypeError as error:
            raise BadImage(f"a list of lists with holes is not an image: {error}") from error
    raise BadImage("the row holds no image" if value is None else f"{an(type(value).__name__)} is not an image")
