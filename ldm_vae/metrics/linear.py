"""Linear floor: metrics of a linear code of the VAE's size, on the very images, clips or sounds that are measured.

The code (`autoencoder/linear_code.py`) is fitted on the measured images themselves: no linear code leaves a smaller
squared error on them.

Legend: B batch, C channels, R side of an image, f pixels or samples of a patch's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm_vae.autoencoder.codebooks import codes_of
from ldm_vae.autoencoder.geometry import downsampling_factor, image_channels, is_of_sounds, latent_channels
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.autoencoder.linear_code import LinearCode, PatchMoments
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import to_values
from ldm_vae.metrics.batches import ImageBatch, image_batches, share_of, spread
from ldm_vae.metrics.metric import Metric
from ldm_vae.metrics.protocol import PINNED, Protocol
from ldm_vae.metrics.ranks import total
from ldm_vae.metrics.running import Summary

MEASURED = ("psnr", "lpips_alex", "snr", "mel_distance")
LARGEST = 1024  # images that a code is fitted on, evenly spread


class LinearFloor:
    """`metrics`, among MEASURED, of a linear code; `update` with the batches that the VAE sees."""

    def __init__(self, code: LinearCode, metrics: Sequence[Metric], protocol: Protocol = PINNED) -> None:
        self.code, self.metrics, self.protocol = code, metrics, protocol

    def update(self, batch: ImageBatch, device: torch.device) -> None:
        pixels = to_values(batch.pixels.to(device))
        decoded = self.code.decode(self.code.encode(pixels)).to(pixels)
        pair = self.protocol.pair(pixels, decoded, batch.indices, batch.alpha, batch.lengths)
        for metric in self.metrics:
            metric.update(pair)

    def compute(self) -> dict[str, Summary]:
        return {metric.name: metric.compute() for metric in self.metrics}


def why_no_code(vae: Any, clips: bool = False) -> str | None:
    """A sentence where no linear code is like this VAE's; None where one is."""
    name, channels = type(vae).__name__, latent_channels(vae)
    frames = lengths_of(vae).joined if clips else 1
    if frames is None:
        return f"linear code: none beside {an(name)}, whose clips have {lengths_of(vae).law} frames and not 1 + t k"
    numbers = frames * downsampling_factor(vae) ** axes_of(vae) * image_channels(vae)
    if codes_of(vae) is not None:
        return f"linear code: none beside {an(name)}, whose codebook is no continuous code"
    if channels > numbers:
        return f"linear code: none beside {an(name)}, which gives {channels} numbers for the {numbers} of a patch"
    return None


def axes_of(vae: Any) -> int:
    """Axes along which a patch has f positions: 1 of sounds."""
    return 1 if is_of_sounds(vae) else 2


def fit_code(
    vae: Any, source: Source, indices: Sequence[int], rank: int, world_size: int, *, resolution: int, batch_size: int
) -> LinearCode | None:
    """The code of the latent size of `vae` for the usable ones of these images, at most LARGEST, the same on every
    rank; None where there is none: `why_no_code`, or of images of one colour."""
    clips = source.decoding.frames is not None
    if why_no_code(vae, clips) is not None:
        return None
    chosen = [indices[place] for place in spread(len(indices), LARGEST)]
    frames = lengths_of(vae).joined or 1 if clips else 1
    moments = PatchMoments(downsampling_factor(vae), image_channels(vae), frames=frames, axes=axes_of(vae))
    for batch in image_batches(
        source, share_of(rank, world_size, chosen, batch_size), resolution, batch_size=batch_size
    ):
        moments.update(batch.pixels)
    moments.add_up(total)
    try:
        return moments.code(latent_channels(vae))
    except UsageError:
        return None
