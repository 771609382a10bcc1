"""Cost of the chosen storage in decoded images or sounds: rounding to the storage dtype, and the seams of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import to_pixels, to_uint8
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.layout import (
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
)
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.work_units import Unit
from ldm_vae.latent_store.remote.at_hand import mapped_tensors, rows_of
from ldm_vae.latent_store.storage.places import Place
from ldm_vae.latent_store.write import sample_stream
from ldm_vae.latent_store.write.crops import cutting_of
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.tiled_encode import seam_error

MOST_PIXELS = 8 * 256 * 256  # measured on about as many images as this holds: a minute for the SD decoder on two cores


@dataclass(frozen=True)
class Costs:
    """Mean PSNR in dB against the images, of sounds SNR, decoded from what the encoder gave and from what is stored;
    the largest difference of the two in grey levels, of sounds in full scales; over how many samples; the error of
    tiles (see `seam_error`) if there are."""

    dtype: str
    exact: float
    stored: float
    worst: float
    samples: int
    seams: tuple[float, float] | None
    sounds: bool = False


@torch.no_grad()
def measure_costs(store: Place, manifest: Manifest, vae: Any, source: Source) -> Costs:
    """Decode a few samples of the newest shard with and without the rounding of the storage dtype."""
    identity, shard = manifest.identity, manifest.shards[-1]
    count = min(shard.rows, max(1, MOST_PIXELS // math.prod(shard.group[1:])))
    indices = rows_of(store, shard, ["source_index"]).column(0)[:count].to_pylist()
    exact = identity.model_copy(update={"resolution": (shard.resolution,)})
    # the same encode stored in fp32, which rounds nothing: the difference is the storage dtype's alone
    if identity.codes is None:
        exact = exact.model_copy(update={"dtype": "fp32"})
    encoder = Encoder(vae, exact, batch_size=manifest.batch_size, device=vae.device)
    stream = sample_stream.samples(source, "", cutting_of(exact, vae), [Unit(0, indices)], encoder.batch_size, 0)
    ready = [item for dealt in stream for item in dealt.ready]
    name = TENSOR_NAMES[identity.store][0]
    mapped = mapped_tensors(store, identity, shard)[name][: len(ready)]
    stored = shards.to_float(mapped, SAFETENSORS_DTYPES[identity.dtype])
    decibels, worst = [], 0.0
    for sample, z, rounded in zip(ready, encoder(ready)[0][name], stored, strict=True):
        pictures = [_picture(vae, value, codes=identity.codes is not None) for value in (z, rounded)]
        decibels.append([_decibels(picture, sample.crops[""]) for picture in pictures])
        worst = max(worst, float((pictures[0].float() - pictures[1].float()).abs().max()))
    seams = None
    if identity.tile is not None and max(shard.size) > identity.tile[0]:
        image = to_pixels(ready[0].crops[""]).to(vae.device)[None]
        seams = seam_error(vae, image, *identity.tile, downsampling_factor(vae))
    before, after = np.mean(decibels, axis=0).tolist()
    return Costs(identity.dtype, before, after, worst, len(ready), seams, ready[0].crops[""].ndim == 2)


def describe_costs(costs: Costs) -> str:
    """A line or two for the end of `ldm-vae encode`."""
    ratio = "SNR" if costs.sounds else "PSNR"
    worst = f"{costs.worst:.1g} of full scale" if costs.sounds else f"{costs.worst:.0f} of 255 grey levels"
    lines = [
        f"  storage as {costs.dtype}: {costs.stored:.3f} dB {ratio} decoded, {costs.exact:.3f} dB before rounding "
        f"({costs.stored - costs.exact:+.4f} dB, at most {worst}, {costs.samples} samples)"
    ]
    if costs.seams is not None:
        rms, largest = costs.seams
        lines.append(
            f"  tiles against the whole image: {rms:.3f} standard deviations root mean square, {largest:.2f} at most"
        )
    return "\n".join(lines)


def _picture(vae: Any, z: np.ndarray[Any, Any], codes: bool) -> torch.Tensor:
    """Stored values [c, *p], or indices of codes => uint8 [C, H, W], of clips [C, T, H, W], of sounds fp32 [C, L]."""
    if codes:
        pixels = finite.decode_indices(vae, torch.from_numpy(z.astype(np.int64))[None].to(vae.device))
    else:
        pixels = finite.decode(vae, torch.from_numpy(z.astype(np.float32))[None].to(vae.device))
    return (pixels.float() if pixels.ndim == 3 else to_uint8(pixels))[0].cpu()


def _decibels(decoded: torch.Tensor, given: torch.Tensor) -> float:
    """PSNR, of sounds SNR, at most 100 and at least -100."""
    error = float((decoded.double() - given.double()).square().mean())
    signal = float(given.double().square().mean()) if given.ndim == 2 else 255.0**2
    if error == 0:
        return 100.0
    return max(-100.0, min(100.0, 10.0 * math.log10(max(signal, 1e-300) / error)))
