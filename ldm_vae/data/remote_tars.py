"""Tar shards at URLs, indexed: each is read once from its beginning to its end, a few megabytes at a time, and what is
where in it is kept in the cache folder, so that neither another process nor another call reads it again."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from ldm_vae.core import atomic_io, fsspec_files
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import cache_dir
from ldm_vae.core.validation import first_line
from ldm_vae.data import tars

BLOCK = 1 << 22  # bytes of a request: of members of 100 KB each costs a fortieth of one
CONNECTIONS = 8  # shards that are indexed at a time: so many blocks are held


@dataclass(frozen=True)
class TarIndex:
    """Members of a shard, what its server says of it, and why its end cannot be read, if it cannot."""

    members: list[tars.Member]
    said: dict[str, Any]
    damage: str


def index(url: str) -> TarIndex:
    """The index of a shard, made once for each version of it.

    Raises:
        UsageError: nothing is there.
        WorkError: the server does not answer.
    """
    try:
        said = fsspec_files.told(url)
    except fsspec_files.AbsentError as error:
        raise UsageError(f"data {url}: no such file") from error
    version = fsspec_files.version_of(said)
    if version is None:  # nothing would show that the shard was replaced
        return _made(url, said)
    folder = cache_dir() / "tars"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(f'{url} {version}'.encode()).hexdigest()}.json"
    with FileLock(path.with_suffix(".lock")):
        try:
            tree = json.loads(path.read_bytes())
            return TarIndex([tars.Member(*member) for member in tree["members"]], said, str(tree["damage"]))
        except (OSError, ValueError, KeyError, TypeError):
            made = _made(url, said)
            members = [[one.name, one.offset, one.size, one.refused] for one in made.members]
            atomic_io.replace(path, atomic_io.data(json.dumps({"members": members, "damage": made.damage}).encode()))
            return made


def _made(url: str, said: dict[str, Any]) -> TarIndex:
    found: list[tars.Member] = []
    damage = ""
    try:
        with tarfile.open(
            fileobj=io.BufferedReader(fsspec_files.RangedFile(url, int(said["size"])), BLOCK), mode="r:"
        ) as archive:
            found.extend(member for member, _ in tars.members(archive))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        damage = first_line(error)
    return TarIndex(found, said, damage)
