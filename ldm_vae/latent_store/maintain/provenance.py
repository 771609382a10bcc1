"""Provenance of a store: its VAE and its images, found by the names in the manifest or by new ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of_store
from ldm_vae.core.errors import UsageError
from ldm_vae.data.flags import NO_FLAGS, DataFlags
from ldm_vae.data.source import Source
from ldm_vae.data.stream import by_index
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.work_units import storable

logger = logging.getLogger(__name__)


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


def find_source(manifest: Manifest, vae: Any, named: str | None = None, flags: DataFlags = NO_FLAGS) -> Source:
    """The images of a store: what is named, else what its manifest names; decoded as its identity says, whatever the
    network records by now, unless flags say otherwise (which is logged).

    Raises:
        UsageError: they are not there, or a flag asks for other channels than the VAE takes.
    """
    place = manifest.recorded.data if named is None else named
    preparation = preparation_of_store(manifest.identity.preprocessing, vae, flags)
    for note in preparation.notes:
        logger.warning("%s", note)
    try:
        return by_index(preparation.open(place))
    except UsageError as problem:
        if named is not None:
            raise
        raise UsageError(f"--data: say where the images of this store are now ({problem})") from problem


def indices_of(source: Source, keys: Iterable[str]) -> dict[str, int]:
    """Source index of each key (as stored); a key that the source does not have is left out."""
    wanted = set(keys)
    found = {}
    for index in range(len(source)):
        key = storable(source.key(index))
        if key in wanted:
            found[key] = index
    return found
