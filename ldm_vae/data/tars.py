"""Tar shards in the WebDataset layout: consecutive members with one name up to the first dot are one sample.

`00000/cat.jpg`, `00000/cat.txt`, `00000/cat.json` are the sample `00000/cat` with an image and two other columns. Read
by the standard library; no member is ever unpacked, and one whose name climbs out of its folder is refused.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from ldm_vae.core.paths import expanded
from ldm_vae.core.text import decode
from ldm_vae.core.validation import check_text, parse_json
from ldm_vae.data.decoding import EXTENSIONS
from ldm_vae.data.files import check_member_name, normal
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.tree import is_hidden, is_system


class SeveralImages(BadImage):
    """Raised for a sample with more than one picture, of which none is the image for a reason."""

    def __init__(self, names: Sequence[str]) -> None:
        shown = ", ".join(names[:3])
        super().__init__(
            f"a sample holds one picture, and this one {len(names)} ({shown}): image_column names it by its extension; "
            "a sample's name ends at the first dot, so 2024.01.05.jpg and 2024.02.07.jpg are one: name them without"
        )


@dataclass
class Member:
    """One file of a shard: name, place of its bytes in the (uncompressed) shard, and why it is refused, if it is."""

    name: str
    offset: int
    size: int
    refused: str = ""

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.split(".", 1)[0]) if path.name else self.name

    @property
    def extension(self) -> str:
        """The rest of the name after that dot, in lower case."""
        return PurePosixPath(self.name).name.partition(".")[2].lower()


@dataclass
class Group:
    """The members of one sample."""

    key: str
    members: list[Member] = field(default_factory=list)

    def image(self, image_column: str | None, endings: Collection[str] = EXTENSIONS) -> Member:
        """The image (or video) among the members. Raises BadImage when there is none, or it is refused."""
        for member in self.members:
            if member.refused:
                raise BadImage(member.refused)
        wanted = [member for member in self.members if is_image(member.extension, image_column, endings)]
        if len(wanted) > 1:
            raise SeveralImages([member.name for member in wanted])
        if not wanted:
            have = ", ".join(member.extension for member in self.members)
            raise BadImage(f"the sample has no image, only {have}")
        return wanted[0]

    def others(self, endings: Collection[str] = EXTENSIONS) -> list[Member]:
        """Members that are columns: all but images."""
        return [member for member in self.members if not is_image(member.extension, None, endings)]


def is_image(extension: str, image_column: str | None, endings: Collection[str] = EXTENSIONS) -> bool:
    """True if a member of this extension is the image; `image_column` is an extension, any picture's if None."""
    return extension == image_column if image_column else f".{extension.rpartition('.')[2]}" in endings


def members(archive: tarfile.TarFile) -> Iterator[tuple[Member, tarfile.TarInfo]]:
    """The files of an open tar, hidden ones and those of systems left out. Raises tarfile.TarError where it is cut."""
    for info in archive:
        *folders, last = PurePosixPath(info.name).parts or ("",)
        if info.isdir() or any(is_hidden(part) for part in (*folders, last)) or any(map(is_system, folders)):
            continue
        refused = "" if info.isreg() else "a link or device, not a file"
        try:
            check_member_name(info.name)
        except BadImage as error:
            refused = error.reason
        yield Member(normal(info.name.removeprefix("./")), info.offset_data, info.size, refused), info


def group(found: Iterable[Member]) -> Iterator[Group]:
    """Consecutive members of one key."""
    current: Group | None = None
    for member in found:
        if current is None or current.key != member.key:
            if current is not None:
                yield current
            current = Group(member.key)
        current.members.append(member)
    if current is not None:
        yield current


def column_value(extension: str, data: bytes) -> Any:
    """A member as a column: `cls` and `index` are integers, text is text (JSON too: it is passed on as it is), the rest
    bytes."""
    try:
        text = decode(data)
    except ValueError:
        return data
    if extension in ("cls", "cls2", "index", "inx", "id") and re.fullmatch(r"\s*-?(0|[1-9]\d{0,17})\s*", text):
        return int(text)  # `007` is a name
    return text


def json_field(text: Any, path: Sequence[str]) -> Any:
    """The value at a path in a JSON text, None where there is none (`caption_column: json.caption`)."""
    try:
        value = parse_json(text)
        check_text(value)
        for step in path:
            value = value[step]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return value


def expand(pattern: str) -> list[str]:
    """Shards that a pattern means: `{000..099}` and `{a,b}` are written out, then `*` and `?` are looked up (files
    only); a folder means the tars in it."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    written = [
        "".join(choice) for choice in product(*(_brace(part) if at % 2 else [part] for at, part in enumerate(parts)))
    ]
    found: list[str] = []
    for name in written:
        if "://" in name:
            found.append(name)
        elif expanded(name).is_dir():
            found += sorted(map(str, expanded(name).glob("*.tar*")))
        elif any(character in name for character in "*?["):
            found += sorted(glob.glob(str(expanded(name))))
        else:
            found.append(str(expanded(name)))
    return found


def _brace(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
