"""Flags of every verb with DATA, spelled once: the choice of images and their decoding.

Nothing heavy is imported, since `--help` has no torch. A flag that is not given is None: what the network records with
its weights then holds (ldm_vae/data/preprocessing.py).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ldm_vae.core.errors import UsageError
from ldm_vae.core.request import Parser, shared

Resize = Literal["short_side", "none"]
SplitPart = Literal["train", "holdout"]

KINDS = ("folder", "frames", "hub", "list", "webdataset", "zip")  # the files of data/sources, without importing them


@dataclass(frozen=True)
class DataFlags:
    """Flags about DATA as given on the command line; None for those that were not."""

    channels: int | None = None
    value_range: tuple[float, float] | None = None
    background: tuple[int, int, int] | None = None
    resize: Resize | None = None
    alpha: bool | None = None
    frames: int | None = None
    frame_rate: float | None = None
    frame_stride: int | None = None
    sample_rate: int | None = None
    samples: int | None = None
    jpeg_draft: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    split: str = "train"
    kind: str | None = None
    part: SplitPart | None = None
    data_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decide(self) -> bool:
        """True when any of them is about pixels."""
        asked = (self.value_range, self.background, self.resize, self.alpha, self.sample_rate)
        return any(value is not None for value in asked)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DataFlags:
        """Make from parsed arguments; a flag that the verb does not have counts as not given.

        Raises:
            UsageError: a value that nothing can be decoded with.
        """
        named = {one.name: flag_of(one.name) for one in fields(cls)}
        given = {name: getattr(arguments, flag) for name, flag in named.items() if hasattr(arguments, flag)}
        for name in ("value_range", "background"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        if given.get("alpha") is not None:
            given["alpha"] = given["alpha"] == "straight"
        flags = cls(**given)
        for name in flags.data_fields:
            if name in cls.__dataclass_fields__:
                raise UsageError(f"--data.{name}: expected --{flag_of(name)}, the flag of that name")
        if flags.channels is not None and flags.channels < 1:
            raise UsageError(f"--channels: expected at least 1, got {flags.channels}")
        if flags.value_range is not None:
            low, high = flags.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low != high):
                raise UsageError(f"--value_range: expected two numbers, black's and white's, got {low:g} {high:g}")
        for name in ("frames", "frame_rate", "frame_stride", "sample_rate", "samples"):
            if (number := getattr(flags, name)) is not None and not (0 < number < math.inf):
                raise UsageError(f"--{flag_of(name)}: expected more than 0, got {number:g}")
        if flags.background is not None and not all(0 <= value <= 255 for value in flags.background):
            raise UsageError(f"--background: expected three numbers from 0 to 255, got {flags.background}")
        return flags


def flag_of(field: str) -> str:
    """The flag of a field, without its dashes: `--samples` is another number in some programs."""
    return "excerpt" if field == "samples" else field


NO_FLAGS = DataFlags()


def add_decoding_arguments(
    parser: argparse.ArgumentParser, *, resize: bool = True, recorded: str | None = "the network"
) -> None:
    """Add the flags for the way from an image's bytes to pixels.

    Args:
        resize: whether the verb cuts crops.
        recorded: what says it where no flag does; None: nothing.
    """
    otherwise = "" if recorded is None else f" (default: as {recorded} records; a flag overrides it)"
    add = parser.add_argument_group(f"how images are decoded{otherwise}").add_argument
    add("--channels", type=int, metavar="N", help="1 (grey), 3 (RGB), 4 (RGBA), any number for arrays")
    add(
        "--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="stored values that become black and white: arrays, .npy, 16-bit and float images",
    )  # fmt: skip
    add("--background", type=int, nargs=3, metavar=("R", "G", "B"), help="background of transparent pixels, 0 to 255")
    add(
        "--alpha", choices=("straight", "channel"),
        help="fourth of four channels: straight (not premultiplied) alpha, or a channel like the others",
    )  # fmt: skip
    add("--frames", type=int, metavar="N", help="videos as clips of N frames, images as clips of one")
    add("--frame_rate", type=float, metavar="F", help="frames a second of a clip (default: those of the video)")
    add("--frame_stride", type=int, metavar="N", help="every Nth frame (1)")
    add("--sample_rate", type=int, metavar="HZ", help="samples a second of sounds, to which they are resampled")
    add("--excerpt", type=int, metavar="N", help="sounds as excerpts of N samples, one after the other (data.samples)")
    if resize:
        add(
            "--resize", choices=("short_side", "none"),
            help="short_side: resize to the crop; none: centre crop without resizing",
        )  # fmt: skip


def add_data_arguments(parser: Parser, *, resize: bool = True, recorded: str | None = "the network") -> None:
    """Add the flags for the choice of images in DATA, and those of `add_decoding_arguments`."""
    add_decoding_arguments(parser, resize=resize, recorded=recorded)
    parser.section = "data"
    add = parser.add_argument_group(
        "which images of DATA", "--data.NAME VALUE is another field of the kind's Config, as in a training config"
    ).add_argument
    add("--image_column", metavar="NAME", help="image column, if DATA has several")
    add("--caption_column", metavar="NAME", help="column used as `caption`; for a folder also an extension (txt)")
    add("--split", default="train", metavar="NAME", help="split of a dataset (train)")
    add("--kind", metavar="KIND", help=f"{', '.join(KINDS)}, or your module, as my_lab.scans (default: detected)")
    if recorded == "the network":
        add(
            "--part", choices=get_args(SplitPart),
            help="of the images that the network's training split (data.holdout): only those that it trained on, or "
            "those held out",
        )  # fmt: skip


def data_flags(**options: Any) -> Any:
    """The field of a request that holds these flags; `options` are those of `add_data_arguments`."""
    return shared(functools.partial(add_data_arguments, **options), DataFlags.of)


def decoding_flags(**options: Any) -> Any:
    """The same of the flags for decoding alone."""
    return shared(functools.partial(add_decoding_arguments, **options), DataFlags.of)
