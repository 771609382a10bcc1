"""Tiling error: the difference between a VAE run on tiles (`enable_tiling`) and on the whole image, and where it lies.

diffusers cuts overlapping tiles of `sample_size` pixels and blends them. Convolutions would not mind, but GroupNorm's
statistics and the middle attention differ from tile to tile, so a tile is a little off as a whole.

Legend: C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.core.errors import UsageError


@dataclass(frozen=True)
class TilingError:
    """Differences in grey levels of 255. At the seams: within the blended bands; inside: everywhere else."""

    tile: int
    overlap: float
    tiles: int
    psnr: float
    largest: float
    at_seams: float
    inside: float
    latent_rms: float
    """Of the tiled encoder against the whole one, in units of the latents' standard deviation."""

    def line(self) -> str:
        """A row for the terminal."""
        return (
            f"overlap {self.overlap:4.0%}: {self.tiles:3d} tiles, {self.psnr:6.2f} dB from the whole image; "
            f"grey levels: at seams {self.at_seams:.2f}, inside {self.inside:.2f}, largest {self.largest:.1f}; "
            f"latents {self.latent_rms:.4f} of their std"
        )


@torch.no_grad()
def measure_tiling(vae: Any, pixels: torch.Tensor, *, tile: int | None = None, overlap: float = 0.25) -> TilingError:
    """Encode and decode `pixels` [1, C, H, W] whole and in tiles.

    Args:
        tile: side of a tile in pixels, a multiple of f; the config's sample_size if None.
        overlap: part of a tile that it shares with the next.

    Raises:
        UsageError: the image is not larger than a tile, or the tile is no multiple of f.
    """
    factor = downsampling_factor(vae)
    side = tile or int(vae.config.sample_size)
    if side % factor or not (side // factor * overlap).is_integer() or side // factor * overlap < 1:
        raise UsageError(
            f"tile: expected a multiple of f = {factor} and an overlap of whole latents, got {side} px, {overlap:.0%}"
        )
    if max(pixels.shape[2:]) <= side:
        raise UsageError(f"IMAGE: {pixels.shape[3]} x {pixels.shape[2]} px is not larger than a tile of {side} px")
    tiled_vae = copy.copy(vae)  # the weights are shared, the switches are not
    tiled_vae.enable_tiling()
    tiled_vae.tile_sample_min_size, tiled_vae.tile_latent_min_size = side, side // factor
    tiled_vae.tile_overlap_factor = overlap
    z = finite.encode(vae, pixels).mean
    z_tiled = finite.encode(tiled_vae, pixels).mean
    whole, tiled = (finite.decode(one, z).clamp(-1, 1) for one in (vae, tiled_vae))
    difference = (whole - tiled).abs() * 127.5
    seams = _seams(pixels.shape[2], pixels.shape[3], side, overlap).to(difference.device)
    error = float((whole - tiled).double().square().mean())
    step = int(side // factor * (1 - overlap))
    return TilingError(
        tile=side,
        overlap=overlap,
        tiles=-(-z.shape[2] // step) * -(-z.shape[3] // step),
        psnr=float(10 * torch.log10(torch.tensor(4.0 / max(error, 1e-20)))),
        largest=float(difference.max()),
        at_seams=float(difference[..., seams].mean()),
        inside=float(difference[..., ~seams].mean()) if not bool(seams.all()) else 0.0,
        latent_rms=float((z_tiled - z).square().mean().sqrt() / z.std()),
    )


def _seams(height: int, width: int, side: int, overlap: float) -> torch.Tensor:
    """[H, W] bool: where one tile is blended into the next."""
    blend = int(side * overlap)
    step = side - blend
    down, right = torch.arange(height), torch.arange(width)
    blended_down, blended_right = ((line >= step) & (line % step < blend) for line in (down, right))
    return blended_down[:, None] | blended_right[None, :]
