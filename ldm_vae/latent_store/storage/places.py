"""Places of stores: a folder, or the URL of an object store; both are storage."""

from __future__ import annotations

from pathlib import Path

from ldm_vae.latent_store.storage.objects import LocalFolder, Storage

Place = Path | str  # as `manifest.place_of` gives it: a string is a URL


def storage_at(place: Place) -> Storage:
    """Storage of the store at a place."""
    if isinstance(place, Path):
        return LocalFolder(place)
    from ldm_vae.latent_store.storage.object_store import ObjectStore  # fsspec, which folders have no need of

    return ObjectStore(place)
