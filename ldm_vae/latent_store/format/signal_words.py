"""Words of a store's signal, for summaries and cards: of images, clips or sounds."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_vae.data.transforms import decoding_of
from ldm_vae.latent_store.format.manifest import Manifest


@dataclass(frozen=True)
class Words:
    """Words of one signal."""

    samples: str
    """Its samples, more than one."""
    axes: str
    """Axes of a sample's latents."""
    positions: str
    """Letters of the axes behind the channels or codebooks."""


_OF_RANK = {
    1: Words("sounds", "channels x positions", "n"),
    2: Words("images", "channels x height x width", "h, w"),
    3: Words("clips", "channels x time x height x width", "t, h, w"),
}


def words_of(manifest: Manifest) -> Words:
    """Words of what a store holds; of images where nothing is in it yet."""
    identity = manifest.identity
    if not manifest.shards:
        return _OF_RANK[2]
    channels = 0 if identity.codes is not None and identity.codebooks is None else 1
    return _OF_RANK[len(manifest.shards[0].shape) - channels]


def sizes_in_words(manifest: Manifest) -> str:
    """Sizes of what was encoded: `256 px`, of sounds `65,536 samples at 24,000 Hz`."""
    sizes, decoding = manifest.identity.resolution, decoding_of(manifest.identity.preprocessing)
    if decoding is not None and decoding.sample_rate is not None:
        return ", ".join(f"{samples:,} samples at {decoding.sample_rate:,} Hz" for samples in sizes)
    return ", ".join(f"{side} px" for side in sizes)
