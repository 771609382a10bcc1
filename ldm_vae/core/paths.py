"""Where this project keeps what it fetched, and whether it may fetch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Converted weights and shards of remote stores: $XDG_CACHE_HOME/ldm-vae, by default ~/.cache/ldm-vae."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldm-vae"


def offline() -> bool:
    """Whether downloads of weights are forbidden: LDM_VAE_OFFLINE=1 or HF_HUB_OFFLINE=1."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"))
