"""A zip of images, read in place: the key is the member's path, the order is the sorted order of keys.

The directory of the archive is held in a few arrays, and a member is read by its offset: nothing is unpacked, no handle
is shared between processes. Captions, labels and other columns: see ldm_vae/data/metadata.py.
"""

from __future__ import annotations

import bisect
import contextlib
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded
from ldm_vae.core.validation import why_unreadable
from ldm_vae.data import tree
from ldm_vae.data.decoding import Decoding, endings_of
from ldm_vae.data.files import MAX_BYTES, Names, check_member_name, check_unique, normal, printable, read_range
from ldm_vae.data.metadata import TreeColumns
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import Named, Record, SourceConfig, not_empty
from ldm_vae.data.stamps import Facts, file_facts
from ldm_vae.data.tree import HEAD, LeftOut

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_ENCRYPTED, _UTF8 = 0x1, 0x800  # of the flags


class Config(SourceConfig):
    """`data: {kind: zip, path: photographs.zip}`."""

    kind: str = "zip"

    def build(self) -> ZipSource:
        path = expanded(self.path)
        if not path.is_file():
            raise self.absent("a zip file")
        source = ZipSource(path, self.decoding(), self.caption_column)
        not_empty(
            source, self.path, f"image ({', '.join(sorted(endings_of(source.decoding)))}); hidden files do not count"
        )
        return source


class ZipSource(Named):
    """Images in a zip archive."""

    def __init__(self, path: Path, decoding: Decoding, caption_column: str | None = None) -> None:
        self.path, self.name = path, str(path)
        self.decoding = decoding
        try:
            with zipfile.ZipFile(path) as archive:
                found = {
                    (_name(member), member.CRC, member.file_size): member
                    for member in archive.infolist()
                    if not member.is_dir()
                }  # a member that is there twice, with the same content, is one
                members = [(name, member) for (name, _, _), member in sorted(found.items())]
                by_name, left_out = dict(members), LeftOut()
                names, endings = (name for name, _ in members), endings_of(decoding)
                images = tree.members(names, endings, left_out, lambda name: _head(archive, by_name[name]))
        except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeError) as error:
            raise UsageError(f"data {path}: cannot be opened as a zip: {why_unreadable(path, error)}") from error
        left_out.tell(self.name)
        self._members = Names(name for name, _ in members)
        check_unique(self._members, self.name, "two members with different content; unpack it, and keep one")
        fields = ("header_offset", "compress_size", "file_size", "compress_type", "flag_bits", "CRC")
        self._fields = np.array([[getattr(member, field) for field in fields] for _, member in members], dtype=np.int64)
        self._columns = TreeColumns(images, self._exists, self._read, caption_column)
        self._names = Names(self._columns.all_names)
        del self._columns.all_names  # held once, packed

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns.names

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Record:
        name = self._names[index]
        return Record(printable(name), self._read(name), self._columns.of(index, name))

    def facts(self, index: int) -> Facts | None:
        at = self._find(self._names[index])
        if at is None:
            return None
        offset, _, size, _, _, crc = map(int, self._fields[at])
        return file_facts(self.path, (offset, crc), size)

    def _find(self, name: str) -> int | None:
        at = bisect.bisect_left(self._members, name)
        return at if at < len(self._members) and self._members[at] == name else None

    def _exists(self, name: str) -> bool:
        return self._find(name) is not None

    def _read(self, name: str) -> bytes:
        check_member_name(name)
        at = self._find(name)
        if at is None:
            raise BadImage("no such member of the archive")
        offset, packed_size, size, method, flags, crc = map(int, self._fields[at])
        if flags & _ENCRYPTED:
            raise BadImage("encrypted")
        if max(size, packed_size) > MAX_BYTES:
            raise BadImage(f"unpacks to {size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:.0f}")
        header = read_range(self.path, offset, _LOCAL_HEADER.size)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise BadImage("the archive is damaged here")
        data = _unpack(
            read_range(self.path, offset + len(header) + name_length + extra_length, packed_size), method, size
        )
        if len(data) != size or zlib.crc32(data) != crc:
            raise BadImage("damaged in the archive (its checksum is wrong)")
        return data


def _unpack(packed: bytes, method: int, size: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return packed
    if method != zipfile.ZIP_DEFLATED:
        raise BadImage(f"compressed by method {method}; stored and deflated members can be read")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)  # never more than it says it is
    except zlib.error as error:
        raise BadImage(f"damaged in the archive: {error}") from error


def _name(member: zipfile.ZipInfo) -> str:
    """A member's name, normalised. Without the flag for UTF-8 it is cp437 by the standard; what is valid UTF-8 beyond
    ASCII is hardly ever meant so (zips by macOS and by older tools)."""
    name = member.filename
    if not member.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return normal(name)


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(HEAD)
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError):
        return b""
