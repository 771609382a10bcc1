"""Images, clips or sounds as a verb is given them, as files and folders, each with a name for what is made of it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldm_vae.core.errors import UsageError
from ldm_vae.core.terminal import print_note
from ldm_vae.data.decoding import EXTENSIONS
from ldm_vae.data.footage import EXTENSIONS as OF_VIDEOS
from ldm_vae.data.footage import SOUNDS
from ldm_vae.data.tree import LeftOut, walk


@dataclass(frozen=True)
class NamedImage:
    """The file of an image, a clip or a sound, its name, and whether a user named it; others may be left out."""

    path: Path
    name: str
    named: bool


def find_images(
    places: Sequence[Path], *, clips: bool = False, sounds: bool = False, taken: Collection[str] = ()
) -> list[NamedImage]:
    """The images (and videos, of clips; or sounds) of files and folders, each under a name of its own; what a folder
    holds beside them is said on stderr.

    Args:
        taken: names that none of them gets.

    Raises:
        UsageError: a folder holds none.
    """
    wanted = EXTENSIONS | OF_VIDEOS if clips else EXTENSIONS
    wanted = SOUNDS | OF_VIDEOS if sounds else wanted
    found: list[NamedImage] = []
    given = {*taken}
    for place in places:
        if not place.is_dir():
            found.append(NamedImage(place, _free(place.stem, given), named=True))
            continue
        left_out = LeftOut()
        below = walk(place, wanted, left_out)
        found += [
            NamedImage(place / one, _free(PurePosixPath(one).with_suffix("").as_posix(), given), named=False)
            for one in below
        ]
        sentences = left_out.sentences()
        if others := left_out.others.total():
            endings = ", ".join(sorted(ending or "no ending" for ending in left_out.others))
            sentences.append(f"left out: {others:,} of other endings ({endings})")
        for sentence in sentences:
            print_note(f"IMAGE {place}: {sentence}")
        if not below:
            endings = ", ".join(sorted(wanted))
            what = "a sound" if sounds else "an image"
            raise UsageError(f"IMAGE {place}: expected {what} ({endings}) in the folder or below it, found none")
    return found


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where another image has it."""
    free = next(one for one in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2))) if one not in taken)
    taken.add(free)
    return free
