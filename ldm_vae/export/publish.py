"""Put a finished folder in its place: everything on disk first, then renames, so that no reader sees half of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ldm_vae.errors import UsageError

# what an export may consist of; a folder that holds anything else is somebody's own and is not replaced
_OURS = (
    "config.json",
    "README.md",
    "latent_statistics.json",
    "latent_preview.json",
    ".gitattributes",
    "pictures",
    "vae",
)
_OUR_SUFFIXES = (".safetensors", ".safetensors.index.json", ".safetensors.index.fp16.json")


def check_replaceable(out: Path) -> None:
    """Raises UsageError unless `out` is free, an empty folder, or an older export and nothing else."""
    if not out.exists():
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"OUT {out}: expected a new folder or an older export, found a file or a link")
    strange = sorted(
        entry.name for entry in out.iterdir() if entry.name not in _OURS and not entry.name.endswith(_OUR_SUFFIXES)
    )
    if strange:
        raise UsageError(f"OUT {out}: holds {strange[0]}, which is not part of an export; choose another folder")


def beside(out: Path) -> Path:
    """An empty folder next to `out`, of a name unique to this process."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def put(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older export steps aside first and is deleted last."""
    for path in folder.rglob("*"):
        if path.is_file():
            settle(path)
    _sync(folder)
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    folder.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(path: Path) -> None:
    """On disk, and readable by whom the umask allows (safetensors writes files that only their owner may read)."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
