"""Where a store came from: its VAE and its images, found again by the names that the manifest has, or by new ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder import encoder_fingerprint, load_autoencoder
from ldm_vae.data.source import Source, open_source
from ldm_vae.errors import UsageError
from ldm_vae.latent_store.manifest import Manifest
from ldm_vae.latent_store.units import storable


def find_vae(store: str | Path, manifest: Manifest, named: str | None = None) -> Any:
    """The VAE of a store: the one that is named, else the one that its manifest names, else a `vae/` beside a folder.

    Raises:
        UsageError: none is found, or its encoder is not the store's: those latents mean nothing to its decoder.
    """
    if named is not None:
        return _checked(store, manifest, named)
    problems = []
    beside = [str(store.resolve().parent / "vae")] if isinstance(store, Path) else []
    for place in (manifest.recorded.vae, *beside):
        try:
            return _checked(store, manifest, place)
        except UsageError as problem:
            problems.append(str(problem))
    raise UsageError(f"--vae: say where the VAE of this store is now ({problems[0]})")


def _checked(store: str | Path, manifest: Manifest, place: str) -> Any:
    vae = load_autoencoder(place)
    if encoder_fingerprint(vae) != manifest.identity.encoder:
        raise UsageError(f"VAE {place}: its encoder is not the one that made the store {store}")
    return vae


def find_source(manifest: Manifest, vae: Any, named: str | None = None, **knobs: Any) -> Source:
    """The images of a store: what is named, else what its manifest names.

    Raises:
        UsageError: they are not there.
    """
    place = manifest.recorded.data if named is None else named
    draft = "jpeg_draft=True" in manifest.identity.preprocessing.split()
    try:
        return open_source(place, channels=int(vae.config.in_channels), jpeg_draft=draft, **knobs)
    except UsageError as problem:
        if named is not None:
            raise
        raise UsageError(f"--data: say where the images of this store are now ({problem})") from problem


def indices_of(source: Source, keys: Iterable[str]) -> dict[str, int]:
    """Where keys (as stored) are in a source; a key that is not there is left out."""
    wanted = set(keys)
    found = {}
    for index in range(len(source)):
        key = storable(source.key(index))
        if key in wanted:
            found[key] = index
    return found
