"""Cache folder, and the switch that forbids downloads."""

from __future__ import annotations

import os
from pathlib import Path

from ldm_vae.core.errors import UsageError


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


def offline() -> bool:
    """True when downloads of weights are forbidden: LDM_VAE_OFFLINE=1 or HF_HUB_OFFLINE=1."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"))
