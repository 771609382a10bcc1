"""The latent store: moments of a whole dataset, written exactly once, never stale, read at memory speed.

The format is described in docs/latent_store_format.md. Names are loaded on first use: a worker that reads latents has
no need of diffusers, which takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_vae.latent_store.format.manifest import Manifest, read_manifest
    from ldm_vae.latent_store.format.statistics import LatentStatistics
    from ldm_vae.latent_store.maintain.verify import Problem, verify
    from ldm_vae.latent_store.read.dataset import LatentDataset
    from ldm_vae.latent_store.write.writer import write_store

__all__ = ["LatentDataset", "LatentStatistics", "Manifest", "Problem", "read_manifest", "verify", "write_store"]

_HOMES = {
    "LatentDataset": "read.dataset",
    "LatentStatistics": "format.statistics",
    "Manifest": "format.manifest",
    "Problem": "maintain.verify",
    "read_manifest": "format.manifest",
    "verify": "maintain.verify",
    "write_store": "write.writer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
