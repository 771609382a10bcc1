"""Cache folder, and the switch that forbids downloads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of converted weights and of remote stores' shards: $XDG_CACHE_HOME/ldm-vae, by default
    ~/.cache/ldm-vae."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldm-vae"


def offline() -> bool:
    """True when downloads of weights are forbidden: LDM_VAE_OFFLINE=1 or HF_HUB_OFFLINE=1."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"))
