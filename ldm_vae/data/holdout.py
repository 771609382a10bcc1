"""Hold-out: the part of a training's images that is validated on and not trained on, chosen by the key of each image.

An image is held out if the number that its key hashes to is in the lowest `share` of all. Nothing else has a say: the
order of the images, the others among them, the number of processes, the seed. So images that are added never move one
from a part to the other, and a larger share only moves images out of training.

Training images that are copies of held-out ones (copies.py) are left out of both parts. They do not follow into the
held-out part, for then an image that is added could take with it one that has been trained on.

Legend: N images.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError
from ldm_vae.data.flags import SplitPart
from ldm_vae.data.source import Named, Record, Source
from ldm_vae.data.stamps import Facts, Stamped, Stamps, key_numbers
from ldm_vae.data.stream import Stream

SAMPLE = 16
Number = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class Holdout(Section):
    """Record of a split: with it, the parts are found again wherever images of these keys are. Keys are written as the
    64 bits that they hash to, since the names of somebody's files are nobody's business."""

    share: float = Field(gt=0, lt=1)
    """Of the images that is held out."""
    keys: str
    """SHA-256 of the numbers of all keys, in their order of size."""
    sample: tuple[Number, ...]
    """The lowest SAMPLE numbers of held-out keys, by which the same images are recognised."""
    left_out: tuple[Number, ...] = ()
    """Of training images that are copies of held-out ones."""


class Subset(Named):
    """Some images of a source, in its order; a source too. `holdout` is the split that it comes from."""

    def __init__(self, source: Source, indices: npt.NDArray[np.int64], holdout: Holdout) -> None:
        self.source, self.indices, self.holdout = source, indices, holdout
        self.columns, self.decoding = source.columns, source.decoding
        self.name: str = getattr(source, "name", type(source).__name__)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def facts(self, index: int) -> Facts | None:
        return self.source.facts(int(self.indices[index])) if isinstance(self.source, Stamped) else None


def numbers_of(source: Any) -> Stamps:
    """Numbers of the keys, uint64 [N]. Raises UsageError for a stream."""
    if isinstance(source, Stream):
        raise UsageError(
            "data.holdout: needs the key of every image beforehand, and data can only be read in order; expected "
            "validation_data"
        )
    return key_numbers(source)


def is_held_out(numbers: Stamps, share: float) -> npt.NDArray[np.bool_]:
    """Membership of the held-out part, [N].

    Raises:
        UsageError: a part has no image.
    """
    held = numbers < np.uint64(share * 2.0**64)
    if not 0 < (count := int(held.sum())) < len(numbers):
        raise UsageError(
            f"data.holdout: {share:g} holds out {count} of {len(numbers):,} images; expected at least one in each "
            "part: another share, or validation_data"
        )
    return held


def record_of(numbers: Stamps, share: float, left_out: Stamps) -> Holdout:
    """The record of a split of images of these keys."""
    ordered = np.sort(numbers)
    return Holdout(
        share=share,
        keys=hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest(),
        sample=_as_text(ordered[: min(SAMPLE, int(is_held_out(numbers, share).sum()))]),
        left_out=_as_text(np.sort(left_out)),
    )


def parts_of(source: Source, numbers: Stamps, holdout: Holdout) -> tuple[Subset, Subset]:
    """Images to train on, and those that are held out.

    Raises:
        UsageError: a part has no image.
    """
    held = is_held_out(numbers, holdout.share)
    train = ~held & ~np.isin(numbers, _as_numbers(holdout.left_out))
    if not train.any():
        raise UsageError(
            f"data.holdout: {holdout.share:g} leaves no image to train on, all others are copies of held-out ones; "
            "data.holdout_copies: keep trains on them"
        )
    return Subset(source, np.flatnonzero(train), holdout), Subset(source, np.flatnonzero(held), holdout)


def part_of(source: Source, holdout: Holdout, part: SplitPart, data: str) -> tuple[Subset, str]:
    """One part of DATA by a recorded split, and what is to be said of it.

    Raises:
        UsageError: DATA has none of the keys that the record knows: under another root all keys are others.
    """
    numbers = numbers_of(source)
    known = np.isin(_as_numbers(holdout.sample), numbers)
    if not known.any():
        raise UsageError(
            f"--part {part}: {data} has none of the held-out images that are recorded, under its names; expected "
            "DATA as it was trained on, from the same folder down"
        )
    train, held = parts_of(source, numbers, holdout)
    chosen = train if part == "train" else held
    said = f"part {part}: {len(chosen):,} of {len(numbers):,} images, by data.holdout {holdout.share:g} of the training"
    if holdout != record_of(numbers, holdout.share, _as_numbers(holdout.left_out)):
        said += f", which had other images ({int(known.sum())} of {len(known)} that were held out are still there)"
    return chosen, said


def _as_text(numbers: Stamps) -> tuple[str, ...]:
    return tuple(f"{number:016x}" for number in numbers.tolist())


def _as_numbers(text: tuple[str, ...]) -> Stamps:
    return np.array([int(number, 16) for number in text], dtype=np.uint64)
