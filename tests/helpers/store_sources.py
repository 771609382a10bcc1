"""Sources in memory, of which tests encode latent stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.data.decoding import Decoding
from ldm_vae.data.ordered import Sample
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.source import Record, image_bytes, image_checksum


@dataclass
class Pictures:
    """A source in memory; indices in `bad` cannot be decoded, those in `broken` cannot even be read."""

    count: int = 21
    size: tuple[int, int] = (24, 20)
    bad: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    decoding: Decoding = field(default_factory=Decoding)
    columns: tuple[str, ...] = ("caption", "label", "tags")

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"folder/img_{index:03d}.png"

    def pixels(self, index: int) -> np.ndarray[Any, Any]:
        draw = np.random.default_rng(index)
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        return np.asarray(coarse.resize(self.size[::-1], Image.Resampling.BICUBIC))

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise BadImage("cannot be read")
        image = b"no image at all" if index in self.bad else self.pixels(index)
        columns = {"caption": f"picture {index}", "label": index % 3, "tags": [f"t{index}", "x"]}
        return Record(self.key(index), image, columns)


class Footage(Pictures):
    """Clips of arrays [T, H, W, 3], of these numbers of frames by turns; 1 is an image."""

    frames: tuple[int, ...] = (5, 5, 9, 1)

    def pixels(self, index: int) -> Any:
        frames = self.frames[index % len(self.frames)]
        first, last = (Pictures.pixels(self, index + more).astype(np.float32) for more in (0, 1000))
        steps = np.linspace(0, 1, frames + 1)[:frames, None, None, None]
        return np.rint((1 - steps) * first + steps * last).astype(np.uint8)


def ordered_clips(
    source: Footage, resolution: int, indices: Any, *, batch_size: int, view: Any, **_: Any
) -> Iterator[tuple[list[Sample], list[Bad]]]:
    """In place of `ordered_loader`: clips of arrays, each crop of all frames."""
    left = iter(indices)
    while some := [*islice(left, batch_size)]:
        good, bad = [], []
        for index in some:
            record = source[index]
            if isinstance(record.image, bytes):
                bad.append(Bad(record.key, "no clip at all"))
                continue
            frames = [view(torch.from_numpy(frame).permute(2, 0, 1), source.size) for frame in record.image]
            crops = [
                replace(one[0], pixels=torch.stack([crop.pixels for crop in one], 1))
                for one in zip(*frames, strict=True)
            ]
            known = image_checksum(record.image), image_bytes(record.image), 0
            good.append(Sample(index, record.key, tuple(crops), record.columns, *known))
        yield good, bad


class Mixed(Pictures):
    """Upright, square and wide pictures by turns."""

    def pixels(self, index: int) -> Any:
        self.size = ((48, 24), (32, 32), (24, 48))[index % 3]
        return super().pixels(index)


@dataclass
class Album(Pictures):
    """Pictures by name: number n shows picture `content[n]` (default n)."""

    numbers: tuple[int, ...] = tuple(range(20))
    content: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, index: int) -> str:
        return f"img_{self.numbers[index]:03d}"

    def __getitem__(self, index: int) -> Record:
        number = self.numbers[index]
        if number in self.broken:
            raise BadImage("cannot be read")
        image = b"no image" if number in self.bad else self.pixels(self.content.get(number, number))
        return Record(self.key(index), image, {"caption": f"picture {number}"})


AFTER: dict[str, Any] = {
    "numbers": (0, 1, 100, 3, 4, 5, 7, *range(8, 18), 101, 102, 19),  # 2, 6 and 18 are gone, 100 to 102 are new
    "content": {5: 205, 12: 212},
    "bad": (4, 101),
}


def names(numbers: Iterable[int]) -> set[str]:
    return {f"img_{number:03d}" for number in numbers}


class Stop(RuntimeError):
    pass


@dataclass
class Stopping(Album):
    """Fails for good after some reads, as a killed process does."""

    after: int = 10**9

    def __getitem__(self, index: int) -> Record:
        self.after -= 1
        if self.after < 0:
            raise Stop
        return super().__getitem__(index)
