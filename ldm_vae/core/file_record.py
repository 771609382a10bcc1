"""File records: size and checksum of a file, the proof that a copy or a download is whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from ldm_vae.core.config import Section


class FileRecord(Section):
    """Size and SHA-256 of one file of a shard."""

    bytes: int
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")  # names the file in a cache: never a path; empty if unreadable


def checksum(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it is on disk; size -1 when it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())
    except OSError:
        return FileRecord(bytes=-1, sha256="")
