"""Measure a VAE's latents: over batches of pixels, over images of any source, or as a latent store has them already.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm_vae import latents
from ldm_vae.autoencoder import check_resolution, downsampling_factor, encoder_fingerprint
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.errors import UsageError, WorkError
from ldm_vae.latent_store.manifest import MANIFEST, read_manifest
from ldm_vae.latent_store.statistics import LatentStatistics
from ldm_vae.metrics.batches import image_batches, spread


@torch.no_grad()
def measure(
    vae: Any, pixel_batches: Iterable[torch.Tensor], device: torch.device | str, *, batches: int | None = None
) -> LatentStatistics:
    """Statistics of the latents of pixels [B, C, H, W] in [-1, 1], summed in fp64, intervals by bootstrap over images.

    Args:
        batches: how many there are, for the progress bar.

    Raises:
        WorkError: there was no image, or the encoder gives NaN or Inf.
    """
    statistics = LatentStatistics()
    for pixels in tqdm(pixel_batches, total=batches, desc="measure latents", unit="batch", disable=None, leave=False):
        statistics.update(latents.encode(vae, pixels.to(device=device, dtype=vae.dtype)))
    if not statistics.images:
        raise WorkError("measuring the latents: there was no usable image")
    if not (statistics.mean.isfinite().all() and statistics.variance.isfinite().all()):
        raise WorkError("measuring the latents: the encoder gives NaN or Inf")
    return statistics


def measure_images(
    vae: Any, data: str, resolution: int, *, batch_size: int = 8, limit: int | None = None
) -> LatentStatistics:
    """Statistics over the images of DATA, whole and centre-cropped; at most `limit`, spread over the source."""
    check_resolution(resolution, downsampling_factor(vae))
    source = open_source(data, channels=int(vae.config.in_channels))
    indices = spread(len(source), limit or len(source))
    quarantine = Quarantine(len(source))
    batches = image_batches(source, indices, resolution, batch_size=batch_size, quarantine=quarantine)
    pixels = (to_pixels(batch.pixels) for batch in batches)
    return measure(vae, pixels, vae.device, batches=-(-len(indices) // batch_size))


def statistics_of(
    vae: Any, stats: str, resolution: int | None, *, batch_size: int = 8, limit: int | None = None
) -> LatentStatistics:
    """Statistics from STORE or DATA. Raises UsageError when the store was made by another encoder."""
    if not (Path(stats) / MANIFEST).is_file():
        side = resolution or int(vae.config.sample_size)
        return measure_images(vae, stats, side, batch_size=batch_size, limit=limit)
    manifest = read_manifest(Path(stats))
    if manifest.statistics is None:
        raise UsageError(f"stats {stats}: the store is not finished and has no statistics yet")
    if manifest.identity.encoder != encoder_fingerprint(vae):
        raise UsageError(f"stats {stats}: the store was made with another encoder ({manifest.recorded.vae})")
    return LatentStatistics.from_json(manifest.statistics)
