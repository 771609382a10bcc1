"""WebDataset tar shards: `shards/{000..099}.tar`, `shards/*.tar`, a folder of them, or URLs of them.

Local, uncompressed shards are indexed once when they are opened (about 50,000 members a second) and then read at random
like any other source. Shards behind a URL, or compressed, are read in order (ldm_vae/data/stream.py); for what needs an
index (encoding) those behind a URL are read once to make one, and then a sample is one request. The key is `SHARD/KEY`:
the shard's name without its ending, and the sample's name in it.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ldm_vae.core.ahead import ahead
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import WINDOW, Transfer
from ldm_vae.core.progress import Progress
from ldm_vae.core.validation import why_unreadable
from ldm_vae.data import tars
from ldm_vae.data.decoding import Decoding, endings_of
from ldm_vae.data.files import MAX_BYTES, Names, check_unique, is_url, read_range
from ldm_vae.data.footage import Video, is_footage
from ldm_vae.data.metadata import rename_caption
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts, url_facts
from ldm_vae.data.stream import InOrderOnly

if TYPE_CHECKING:
    from ldm_vae.data.remote_tars import TarIndex

clock = time.monotonic


class Config(SourceConfig):
    """`data: {kind: webdataset, path: "shards/{000..099}.tar", caption_column: txt}`. Columns are named by the
    extensions of the members; `json.caption` is a field of a JSON member."""

    kind: str = "webdataset"
    shuffle_buffer: int = Field(1000, ge=0)
    """Images among which shards that can only be read in order are shuffled; held as files, undecoded."""

    def build(self) -> TarSource | TarStream:
        if self.path.startswith("pipe:"):
            raise UsageError(f"data.path {self.path}: programs are not started; give files or URLs")
        shards = tars.expand(self.path)
        if not shards:
            raise self.absent("tar files")
        if any("://" in shard or not shard.endswith(".tar") for shard in shards):
            return TarStream(shards, self)
        source = TarSource(shards, self.decoding(), self.image_column, self.caption_column)
        not_empty(source, self.path, "image")
        return source


def shard_names(shards: Sequence[str]) -> dict[str, str]:
    """The names of shards in keys: without folder and ending, or, where two would be the same, their path below the
    folder that they share."""
    stems = {shard: PurePosixPath(shard).name.split(".", 1)[0] for shard in shards}
    if len(set(stems.values())) == len(stems):
        return stems
    above = os.path.commonpath([str(PurePosixPath(shard).parent) for shard in shards])
    return {shard: str(PurePosixPath(shard).parent.relative_to(above) / stem) for shard, stem in stems.items()}


def with_caption(columns: dict[str, Any], caption_column: str | None) -> dict[str, Any]:
    """The columns of a sample with the caption under its name."""
    head, *path = (caption_column or "").split(".")
    if path and caption_column not in columns:
        return {**columns, "caption": tars.json_field(columns.get(head), path)}
    return rename_caption(columns, caption_column)


class TarSource(Named):
    """Samples of local, uncompressed shards, by index."""

    def __init__(
        self, shards: list[str], decoding: Decoding, image_column: str | None, caption_column: str | None
    ) -> None:
        self.decoding = decoding
        self._shards = shards
        self._indices = _indices([shard for shard in shards if is_url(shard)])
        self.name = shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1:,} more"
        self._captions = caption_column
        self._extensions: list[str] = []
        self._refused: dict[int, str] = {}
        keys: list[str] = []
        names = shard_names(shards)
        # shard, offset, size of each image, whether it is a video; extension, offset, size of each other member, and
        # where a sample's end, in flat arrays, which take a fraction of the memory of tuples of Python's integers
        images, others, ends = array("q"), array("q"), array("q")
        for number, shard in enumerate(Progress(shards, desc="indexing shards", unit="shards", leave=False)):
            for key, image, rest in self._index(shard, image_column):
                if isinstance(image, str):
                    # still a sample, with its key and reason: the order and number of samples do not depend on damage
                    self._refused[len(keys)] = image
                    images.extend((number, 0, 0, 0))
                else:
                    images.extend((number, image.offset, image.size, is_footage(image.name)))
                for member in rest:
                    if member.extension not in self._extensions:
                        self._extensions.append(member.extension)
                    others.extend((self._extensions.index(member.extension), member.offset, member.size))
                ends.append(len(others) // 3)
                keys.append(f"{names[shard]}/{key}")
        self._names = Names(keys)
        check_unique(self._names, self.name, "two samples of that name in one shard, or one shard given twice")
        self._images = np.array(images, dtype=np.int64).reshape(-1, 4)
        self._others = np.array(others, dtype=np.int64).reshape(-1, 3)
        self._ends = np.array(ends, dtype=np.int64)
        head = (caption_column or "").split(".")[0]
        if caption_column is not None and not {caption_column, head} & {*self._extensions}:
            have = ", ".join(self._extensions) or "none"
            raise UsageError(f"data.caption_column {caption_column}: the samples' other members are {have}")
        self.columns: tuple[str, ...] = tuple(with_caption(dict.fromkeys(self._extensions), caption_column))

    def _index(
        self, shard: str, image_column: str | None
    ) -> Iterator[tuple[str, tars.Member | str, list[tars.Member]]]:
        """(key, image or the reason why there is none, other members) of each sample; damage ends a shard early."""
        damage: list[str] = []
        endings = endings_of(self.decoding)
        for sample in tars.group(self._members(shard, damage)):
            try:
                image: tars.Member | str = sample.image(image_column, endings)
            except tars.SeveralImages as error:
                raise UsageError(f"data.image_column: {shard}, sample {sample.key}: {error.reason}") from error
            except BadImage as error:
                image = error.reason
            yield sample.key, image, sample.others(endings)
        # the damaged rest has a key of its own, so the quarantine shows that something is missing
        for reason in damage:
            yield "rest-of-shard", f"the rest of the shard cannot be read: {reason}", []

    def _members(self, shard: str, damage: list[str]) -> Iterator[tars.Member]:
        """Members of a shard; where it is damaged, why."""
        if (known := self._indices.get(shard)) is None:
            return _members_until_damage(shard, damage)
        damage += [known.damage] if known.damage else []
        return iter(known.members)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Record:
        key = self._names[index]
        if index in self._refused:
            raise BadImage(self._refused[index])
        number, offset, size, video = map(int, self._images[index])
        shard = self._shards[number]
        # members of sample i: from the end of sample i - 1 to its own
        others = self._others[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
        take: Callable[[int, int], bytes] = partial(read_range, shard)
        if shard in self._indices:
            take = _at_once(shard, [(offset, size), *((start, length) for _, start, length in others)])
        columns: dict[str, Any] = dict.fromkeys(self._extensions)
        for which, start, length in others:
            columns[self._extensions[which]] = tars.column_value(self._extensions[which], take(start, length))
        if not video:
            image: bytes | Video = take(offset, size)
        else:
            image = Video(take(offset, size)) if shard in self._indices else Video(shard, offset, size)
        return Record(key, image, with_caption(columns, self._captions))

    def facts(self, index: int) -> Facts | None:
        number, offset, size, _ = map(int, self._images[index])
        if index in self._refused:
            return None
        if (known := self._indices.get(self._shards[number])) is not None:
            return url_facts(known.said, (offset,), size)
        return file_facts(self._shards[number], (offset,), size)


def _indices(urls: Sequence[str]) -> dict[str, TarIndex]:
    if not urls:
        return {}
    from ldm_vae.data.remote_tars import CONNECTIONS, index  # fsspec, which files have no need of

    found = ahead(index, urls, CONNECTIONS)
    return dict(zip(urls, Progress(found, "indexing shards", len(urls), unit="shards", leave=False), strict=True))


def _at_once(url: str, places: Sequence[tuple[int, int]]) -> Callable[[int, int], bytes]:
    """Read ranges (offset, size) of a file at a URL: one request, since a sample's members lie side by side."""
    first, stop = min(start for start, _ in places), max(start + size for start, size in places)
    data = read_range(url, first, stop - first)
    return lambda offset, size: data[offset - first : offset - first + size]


def _members_until_damage(shard: str, damage: list[str]) -> Iterator[tars.Member]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for member, _ in tars.members(archive):
                yield member
    except FileNotFoundError as error:
        raise UsageError(f"data {shard}: no such file") from error
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        damage.append(why_unreadable(Path(shard), error))


class TarStream(InOrderOnly):
    """Samples of shards that can only be read in order: behind URLs, or compressed."""

    columns: tuple[str, ...] = ()

    def __init__(self, shards: list[str], config: Config) -> None:
        self.name, self._config = config.path, config
        self.decoding = config.decoding()
        self.shuffle_buffer = config.shuffle_buffer
        self._shards = shard_names(shards)
        self._image_column = config.image_column
        self._captions = config.caption_column

    def indexed(self) -> TarSource:
        """The same samples by index: each shard is read once to make it.

        Raises:
            UsageError: a shard is compressed, which only reading in order can open.
        """
        if packed := [shard for shard in self._shards if not shard.endswith(".tar")]:
            raise UsageError(
                f"data {packed[0]}: expected shards that end in .tar: a compressed one has no index; unpack it"
            )
        config = self._config
        source = TarSource([*self._shards], self.decoding, config.image_column, config.caption_column)
        not_empty(source, self.name, "image")
        return source

    def __iter__(self) -> Iterator[Record | Bad]:
        for shard, name in self._shards.items():
            yield from self._samples(shard, name)

    def _samples(self, shard: str, name: str) -> Iterator[Record | Bad]:
        bytes_of: dict[str, bytes] = {}
        try:
            with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
                for sample in tars.group(_keep_bytes(archive, bytes_of)):
                    yield self._record(name, sample, bytes_of)
                    for member in sample.members:
                        # only the current sample's bytes are held
                        bytes_of.pop(member.name, None)
        except Exception as error:  # the network, the server, the archive: any kind
            reason = str(error) or type(error).__name__
            yield Bad(f"{name}/rest-of-shard", f"the rest of the shard cannot be read: {reason}")

    def _record(self, name: str, sample: tars.Group, bytes_of: dict[str, bytes]) -> Record | Bad:
        try:
            image = sample.image(self._image_column, endings_of(self.decoding))
        except BadImage as error:
            return Bad(f"{name}/{sample.key}", error.reason)
        columns = {
            member.extension: tars.column_value(member.extension, bytes_of[member.name])
            for member in sample.others(endings_of(self.decoding))
        }
        return Record(f"{name}/{sample.key}", bytes_of[image.name], with_caption(columns, self._captions))


def _open(shard: str) -> Any:
    """A file or URL for reading in order; http by the standard library, other schemes (s3, gs, hf) by fsspec."""
    if shard.startswith(("http://", "https://")):
        return _Paced(urllib.request.urlopen(shard, timeout=WINDOW))
    if "://" in shard:
        import fsspec

        return fsspec.open(shard, "rb")
    return open(shard, "rb")


class _Paced(contextlib.closing[Any]):
    """An answer over http that is read as it comes, and given up when next to nothing does."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self._answer, self._transfer = answer, Transfer(None)

    def __enter__(self) -> _Paced:
        return self

    def read(self, size: int) -> bytes:
        began = clock()
        data: bytes = self._answer.read1(size)  # `read` waits for all of them, at whatever pace
        self._transfer.add(len(data), clock() - began)
        return data


def _keep_bytes(archive: tarfile.TarFile, bytes_of: dict[str, bytes]) -> Iterator[tars.Member]:
    """The members, their bytes put aside on the way: a stream cannot go back."""
    for member, info in tars.members(archive):
        if member.size > MAX_BYTES:
            member.refused = f"a member of {member.size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:.0f}"
        elif not member.refused:
            file = archive.extractfile(info)
            bytes_of[member.name] = file.read() if file is not None else b""
        yield member
