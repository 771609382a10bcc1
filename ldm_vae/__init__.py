"""ldm-vae: train, export, cache and measure the autoencoder of a latent diffusion model.

`load_autoencoder` and `LatentDataset` are loaded on first use, since torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# first: it asks who started this process before torch is imported
from ldm_vae.core import parent_process as parent_process

if TYPE_CHECKING:
    from ldm_vae.autoencoder.model import load_autoencoder
    from ldm_vae.latent_store import LatentDataset

__version__ = "0.1.0"
__all__ = ["LatentDataset", "load_autoencoder"]

_HOMES = {"LatentDataset": "ldm_vae.latent_store", "load_autoencoder": "ldm_vae.autoencoder.model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
