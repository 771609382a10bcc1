"""Sources in memory, of which tests encode latent stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ldm_vae.data.decoding import Decoding
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Record


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
