"""Measurement of a VAE's latents: over batches of pixels, over images of any source, or as a latent store has them.

Legend: B batch, C image channels, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.geometry import check_resolution, latent_channels
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.autoencoder.preparation import Preparation, check_same, preparation_of, recorded
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.transforms import decoding_of, to_values
from ldm_vae.latent_store.format.manifest import MANIFEST, read_manifest
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.write.finalize import with_intervals
from ldm_vae.metrics.batches import ImageBatch, image_batches, spread


@torch.no_grad()
def measure(vae: Any, pixel_batches: Iterable[torch.Tensor], device: torch.device | str) -> LatentStatistics:
    """Statistics of the latents of pixels [B, C, H, W] or [B, C, T, H, W] in [-1, 1], per channel over all positions,
    summed in fp64, with intervals over images or clips.

    Raises:
        WorkError: there was no image, or the encoder gives NaN or Inf.
    """
    statistics = LatentStatistics(patch=family_of(vae).patch)
    for pixels in Progress(pixel_batches, desc="measure latents", unit="batch", leave=False):
        statistics.update(finite.encode(vae, pixels.to(device=device, dtype=vae.dtype)))
    if not statistics.images:
        raise WorkError("measuring the latents: there was no usable image")
    return statistics


@dataclass(frozen=True)
class Images:
    """Images of DATA as an export uses them: whole, centre-cropped, at most `limit` of them, spread over the source."""

    data: str
    resolution: int
    batch_size: int = 8
    limit: int | None = None
    preparation: Preparation | None = None
    """Their decoding; as the VAE records by default."""

    def batches(self, vae: Any) -> Iterator[torch.Tensor]:
        """Pixels [B, C, H, W] or [B, C, T, H, W] in [-1, 1], or sounds [B, C, L], for this VAE. Raises UsageError when
        the resolution does not fit f."""
        return (to_values(batch.pixels) for batch in self.image_batches(vae))

    def image_batches(self, vae: Any) -> Iterator[ImageBatch]:
        """Batches of the same images, as metrics take them."""
        check_resolution(self.resolution, vae)
        source = (self.preparation or preparation_of({"": vae})).open(self.data)
        indices = spread(len(source), self.limit or len(source))
        quarantine = Quarantine(len(source))
        return image_batches(source, indices, self.resolution, batch_size=self.batch_size, quarantine=quarantine)


def is_store(stats: str) -> bool:
    """True if what `--stats` names is a latent store rather than images."""
    return (Path(stats) / MANIFEST).is_file()


def base_normalisation(base: str, channels: int) -> Normalisation:
    """The normalisation that another VAE's config names: a fine-tuned decoder keeps it, since the diffusion model that
    it serves was trained on latents so normalised.

    Raises:
        UsageError: there is no such VAE, its config names two normalisations or none that can be divided by, or its
            latents have another number of channels.
    """
    vae = load_autoencoder(base)
    if latent_channels(vae) != channels:
        came = f"{latent_channels(vae)} latent channels, this VAE {channels}"
        raise UsageError(f"normalisation_from {base}: expected a VAE with the same latents, it has {came}")
    return normalisation_of(vae, f"normalisation_from {base}")


def statistics_of_store(vae: Any, store: str, preparation: Preparation | None = None) -> LatentStatistics:
    """Statistics of a store's latents, as they were measured when it was made.

    Args:
        preparation: how the images must have been decoded, flags included; as the VAE records by default.

    Raises:
        UsageError: another encoder made it, or from images that were decoded in another way than is recorded.
    """
    manifest = read_manifest(store)
    if manifest.statistics is None:
        raise UsageError(f"stats {store}: the store is not finished and has no statistics yet")
    if manifest.identity.encoder != encoder_fingerprint(vae):
        raise UsageError(f"stats {store}: the store was made with another encoder ({manifest.recorded.vae})")
    if manifest.identity.codes is not None:
        raise UsageError(f"stats {store}: the store holds indices of codes, which have no mean and variance")
    stored, preparation = decoding_of(manifest.identity.preprocessing), preparation or preparation_of({"": vae})
    if stored is not None and (recorded(vae) is not None or preparation.flags.decide):
        check_same(
            "the VAE records", preparation.decoding, f"the store {store}", stored, {},
            "give the store's as a flag if it is meant, or another store",
        )  # fmt: skip
    return LatentStatistics.from_json(with_intervals(store, manifest).statistics or {})
