"""Trees of files, on disk or in an archive: the images in them, and what is left out and said.

Left out are hidden files and folders, folders that operating systems, storage servers and photo managers make beside
images (thumbnails, recycle bins, previews), and what this toolkit has written. Files of another ending that begin as
images do are counted.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from pathlib import Path, PurePosixPath

from ldm_vae.core.files import open_plain
from ldm_vae.core.ownership import MARK

logger = logging.getLogger(__name__)

# compared in lower case; docs/data.md names their makers
SYSTEM_FOLDERS = frozenset({
    "@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin", "@sharesnap", "@recycle", "@recently-snapshot",
    "@upload_cache", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found",
    "__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder", "ipod photo cache", "captureone",
    "_gsdata_", "sync.trashed",
})  # fmt: skip
SYSTEM_ENDINGS = (
    *(".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary"),
    *(".lrdata", ".lrlibrary", ".cocatalog", ".cosessiondb"),
)
# a folder that holds all of one row is this toolkit's, or a network or pipeline of diffusers
WRITTEN = (
    {MARK},
    {"config.yaml", "metrics.jsonl"},  # a run
    {"manifest.json", "shards"},  # a latent store
    {"metrics.json", "pictures"},  # an evaluation
    {"pictures.json"},
    {"config.json", "diffusion_pytorch_model.safetensors"},
    {"model_index.json"},
)
# first bytes, and from where they count: formats that are not read, and those that are, under another ending
SIGNATURES = (
    *((0, start) for start in (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((0, start) for start in (b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"8BPS", b"v/1\x01", b"#?RADIANCE")),
    *((0, start) for start in (b"FUJIFILMCCD-RAW", b"IIRO", b"IIU\0", b"qoif", b"DDS ", b"FLIF", b"BPG\xfb")),
    *((4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif")),
    *((4, b"ftyp" + brand) for brand in (b"avis", b"crx ")),
    (8, b"WEBP"),
)
HEAD = 24  # bytes that decide
NEVER_IMAGES = {
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".caption", ".parquet", ".arrow", ".npz", ".pt", ".pth"),
    *(".safetensors", ".ckpt", ".bin", ".md", ".html", ".htm", ".xml", ".xmp", ".yaml", ".yml", ".toml", ".log"),
    *(".db", ".ini", ".py", ".ipynb", ".tar", ".zip", ".gz", ".zst", ".mp4", ".mov", ".wav", ".mp3", ".flac"),
}
LOOKS = 1000  # files of one ending that are opened; an ending none of whose first thousand is an image has none

Head = Callable[[str], bytes]
"""Path in the tree => the first bytes of the file; empty when it cannot be read."""


def is_hidden(name: str) -> bool:
    """True for a hidden file or folder, the `._x` that macOS puts beside x included."""
    return name.startswith(".") and name not in (".", "..")


def is_system(folder: str) -> bool:
    """True for the name of a folder that a system makes beside images."""
    return folder.lower() in SYSTEM_FOLDERS or folder.lower().endswith(SYSTEM_ENDINGS)


def is_written(names: set[str]) -> bool:
    """True if a folder that holds these is this toolkit's."""
    return any(row <= names for row in WRITTEN)


class LeftOut:
    """Files and folders that a walk has left out; `tell` says them."""

    def __init__(self) -> None:
        # dictionaries as sets that keep the order
        self.hidden, self.system, self.written, self.links = (dict[str, None]() for _ in range(4))
        self.others: Counter[str] = Counter()  # ending => files of it, which is no image's
        self.unread: Counter[str] = Counter()  # ending => those that are images by content
        self._looked: Counter[str] = Counter()

    def look(self, path: str, head: Head) -> None:
        """Count a file of another ending if it is an image."""
        ending = PurePosixPath(path).suffix.lower()
        self.others[ending] += 1
        if ending in NEVER_IMAGES or (self._looked[ending] >= LOOKS and not self.unread[ending]):
            return
        self._looked[ending] += 1
        start = head(path)
        self.unread[ending] += any(start[at : at + len(signature)] == signature for at, signature in SIGNATURES)

    def sentences(self) -> list[str]:
        """One sentence for each kind that was left out, with what would do."""
        found = []
        for names, what in (
            (self.hidden, "hidden"),
            (self.system, "folders of a system or photo manager"),
            (self.written, "folders that ldm-vae or diffusers has written"),
            (self.links, "links to folders that are read already, or to nothing"),
        ):
            if names:
                found.append(f"left out: {len(names):,} {what} ({_some(names)})")
        unread = {ending or "no ending": count for ending, count in self.unread.items() if count}
        if unread:
            counts = ", ".join(f"{count:,} of {ending}" for ending, count in sorted(unread.items()))
            found.append(
                f"not read: {counts}, images by their content; convert them, or give them their format's ending"
            )
        return found

    def tell(self, data: str) -> None:
        """Say it once for each source of a process."""
        for sentence in self.sentences():
            if (data, sentence) not in _SAID:
                _SAID.add((data, sentence))
                logger.warning("data %s: %s", data, sentence)


_SAID: set[tuple[str, str]] = set()


def _some(names: Collection[str]) -> str:
    first = ", ".join(repr(name)[1:-1] for name in islice(names, 3))
    return first + (", ..." if len(names) > 3 else "")


def walk(root: Path, extensions: frozenset[str], left_out: LeftOut | None = None) -> list[str]:
    """POSIX paths, relative to `root` and sorted, of all files below it with one of the extensions.

    Linked folders are entered after all others, and no folder twice: neither a link back nor many links to one place
    repeat an image.
    """
    left_out = left_out or LeftOut()
    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    links: list[str] = []

    def enter(prefix: str) -> list[str]:
        """Look at a folder; returns those in it."""
        folder, inner = root / prefix, []
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            left_out.links[prefix] = None
            return []
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        if prefix and is_written({entry.name for entry in entries}):
            left_out.written[prefix] = None
            return []
        for entry in entries:
            name, path = entry.name, prefix + entry.name
            ending = os.path.splitext(name)[1].lower()
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads back to itself
                left_out.links[path] = None
                continue
            if is_hidden(name):
                if is_folder or ending in extensions:
                    left_out.hidden[path] = None
            elif is_folder and is_system(name):
                left_out.system[path] = None
            elif is_folder and entry.is_symlink():
                links.append(path)
            elif is_folder:
                inner.append(f"{path}/")
            elif ending in extensions:
                found.append(path)
            elif entry.is_file():
                left_out.look(path, lambda path: _head(root / path))
        return inner

    # a stack, since a tree may be deeper than Python's
    folders = [""]
    while folders or links:
        # links breadth first: in an order that does not depend on the file system
        folders += reversed(enter(folders.pop() if folders else f"{links.pop(0)}/"))
    return sorted(found)


def members(names: Iterable[str], extensions: frozenset[str], left_out: LeftOut, head: Head) -> list[str]:
    """The images among the files of an archive, by the rules of `walk`."""
    names = list(names)
    inside: dict[str, set[str]] = {}  # folder => names in it
    for name in names:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            inside.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    written = {folder for folder, there in inside.items() if is_written(there)}
    found = []
    for name in names:
        *folders, last = name.split("/")
        above = ["/".join(folders[:depth]) for depth in range(1, len(folders) + 1)]
        ending = os.path.splitext(last)[1].lower()
        for folder, path in zip(folders, above, strict=True):
            reason = (
                left_out.hidden if is_hidden(folder) else left_out.system if is_system(folder)
                else left_out.written if path in written else None
            )  # fmt: skip
            if reason is not None:
                reason[f"{path}/"] = None
                break
        else:
            if is_hidden(last):
                if ending in extensions:
                    left_out.hidden[name] = None
            elif ending in extensions:
                found.append(name)
            else:
                left_out.look(name, head)
    return found


def _head(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            return file.read(HEAD)
    except OSError:
        return b""
