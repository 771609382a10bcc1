"""Streams: sources that can only be read in order (`streaming: true`, tar shards behind a URL or compressed).

Unsupported operations fail clearly: `length` is None, `len` and an index raise UsageError. Training reads them
through a shuffle buffer, keyed like everything else, so the batches do not depend on ranks or workers, and a resumed
run goes on exactly; the price is that each rank reads the whole stream and keeps its part, and that resuming reads
again what was read before.

Legend: B batch of one rank, GB of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol, runtime_checkable

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.quarantine import Bad
from ldm_vae.data.sampler import Task, Work
from ldm_vae.data.source import Record, Source


@runtime_checkable
class Stream(Protocol):
    """Images in a fixed order, readable from the beginning any number of times; bad ones come as Bad."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def shuffle_buffer(self) -> int:
        """Images among which training shuffles; they are held as they come, undecoded."""

    def __iter__(self) -> Iterator[Record | Bad]: ...


class InOrderError(UsageError, TypeError):
    """Raised for an operation that a stream does not support. A TypeError too: `list(stream)` expects it of an absent
    length."""


class InOrderOnly:
    """Mixin that refuses a length, keys and indices with one sentence each."""

    name: str

    def __len__(self) -> int:
        self._cannot("has no length")

    def key(self, index: int) -> str:
        self._cannot(f"cannot name its image {index}")

    def __getitem__(self, index: int) -> Record:
        self._cannot(f"cannot go to its image {index}")

    def _cannot(self, what: str) -> NoReturn:
        raise InOrderError(
            f"data {self.name}: read in order, it {what}; download it first (no streaming, uncompressed local shards), "
            "or use it for training only"
        )


def by_index(source: Source) -> Source:
    """The same images by index, where a stream can be indexed, which may take reading it once; else the source."""
    indexed: Source = source.indexed() if hasattr(source, "indexed") else source
    return indexed


def warning(name: str) -> str:
    """Warning about the limits of training from a stream, for the user before it starts."""
    return (
        f"data {name}: read in order: its length is unknown, each process reads all of it and keeps its part, and a "
        "resumed run first reads again what it had read (the batches stay the same)"
    )


def length(source: Any) -> int | None:
    """Number of images of a source; None for a stream."""
    return None if isinstance(source, Stream) else len(source)


def batches(
    stream: Stream, seed: int, *, batch_size: int, rank: int = 0, world_size: int = 1, start_position: int = 0
) -> Iterator[Work]:
    """This rank's batches, for ever; position p is the p-th usable image of the shuffled epochs, one after the other.

    Raises:
        WorkError: an epoch without a single image.
    """
    position, epoch = 0, 0
    tasks: list[Task] = []
    bad: list[Bad] = []
    while True:
        # Every rank walks the whole stream and counts every usable image, so all of them agree on positions without
        # talking.
        images, first_bad = 0, None
        for item in _shuffled(stream, seed, epoch):
            if isinstance(item, Bad):
                first_bad = first_bad or item
                if (position - start_position) // batch_size % world_size == rank:  # told by one rank, not by all
                    bad.append(item)
                continue
            index, record = item
            images += 1
            # negative while a resumed run skips what it had seen: read again, but not given
            here = position - start_position
            position += 1
            # blocks of batch_size positions go to the ranks in turn, which is the slice that `sampler` gives them
            if here >= 0 and here // batch_size % world_size == rank:
                tasks.append(Task(start_position + here, epoch, index, record))
            if len(tasks) == batch_size:
                yield Work(tasks, bad=tuple(bad))
                tasks, bad = [], []
        if not images:
            reason = f"; the first bad one is {first_bad.key} ({first_bad.reason})" if first_bad else ""
            raise WorkError(f"no usable image in the stream{reason}")
        epoch += 1


def _shuffled(stream: Stream, seed: int, epoch: int) -> Iterator[tuple[int, Record] | Bad]:
    """(index in the stream, record) in the order of an epoch."""
    # one generator an epoch, drawn from in the order of the stream: the same on every rank and after a resume
    draw = rng.generator(seed, "shuffle", epoch)
    buffer: list[tuple[int, Record]] = []
    index = 0
    for item in stream:
        if isinstance(item, Bad):
            yield item
            continue
        buffer.append((index, item))
        index += 1
        # full: a random one leaves and the last takes its place, O(1) for each image
        if len(buffer) > stream.shuffle_buffer:
            at = int(draw.integers(len(buffer)))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()
    # at the stream's end the rest leaves in random order, so each image comes exactly once an epoch
    draw.shuffle(buffer)
    yield from buffer
