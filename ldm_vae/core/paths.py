"""Cache folder, and the switch that forbids downloads."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import nearest

MOST_NAMES = 10_000  # of a folder that are compared with a mistyped one: some 0.1 s


def cache_dir() -> Path:
    """Folder of converted weights and of remote stores' shards: $XDG_CACHE_HOME/ldm-vae, by default
    ~/.cache/ldm-vae.

    Raises:
        UsageError: neither is known.
    """
    base = os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")
    if str(base).startswith("~"):
        raise UsageError("no home folder for the cache: $HOME is not set; set it, or XDG_CACHE_HOME to a folder")
    return Path(base) / "ldm-vae"


def expanded(path: str | Path) -> Path:
    """A path with `~` as the home folder; as it is where nobody has one (pathlib's own is a RuntimeError then)."""
    return Path(os.path.expanduser(path))


def nearest_path(path: str | Path) -> str:
    """`, did you mean PATH`, where a name like the first missing one of the path exists beside it, else nothing."""
    place = expanded(path)
    missing = list(itertools.takewhile(lambda one: not one.exists(), (place, *place.parents)))
    if not missing:
        return ""
    first = missing[-1]
    try:
        with os.scandir(first.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
    except OSError:  # a file is no folder, and a folder may be closed
        return ""
    rest = place.relative_to(first)

    def meant(name: str) -> str:
        near = first.parent / name
        return str(near / rest if (near / rest).exists() else near)

    return nearest(first.name, names, shown=meant)


def offline() -> bool:
    """True when downloads of weights are forbidden: LDM_VAE_OFFLINE=1 or HF_HUB_OFFLINE=1."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"))
