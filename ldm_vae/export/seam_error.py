"""Tiling error: the difference between a VAE run on tiles (`enable_tiling`) and on the whole image, and where it lies.

diffusers cuts overlapping tiles and blends them, in each class by code of its own. Convolutions would not mind, but
GroupNorm's statistics and the middle attention differ from tile to tile, so a tile is a little off as a whole.

Legend: C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.geometry import downsampling_factor, sample_size
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.core.validation import first_line


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
    latent_rms: float | None
    """Of the tiled encoder against the whole one, in units of the latents' standard deviation; None where it cannot
    encode in tiles."""

    def line(self) -> str:
        """A row for the terminal."""
        return (
            f"overlap {self.overlap:4.0%}: {self.tiles:3d} tiles, {self.psnr:6.2f} dB from the whole image; "
            f"grey levels: at seams {self.at_seams:.2f}, inside {self.inside:.2f}, largest {self.largest:.1f}; "
            + ("not encoded in tiles" if self.latent_rms is None else f"latents {self.latent_rms:.4f} of their std")
        )


@torch.no_grad()
def measure_tiling(vae: Any, pixels: torch.Tensor, *, tile: int | None = None, overlap: float = 0.25) -> TilingError:
    """Encode and decode `pixels` [1, C, H, W] whole and in tiles.

    Args:
        tile: side of a tile in pixels, a multiple of f; the config's sample_size if None (512 where it has none).
        overlap: part of a tile that it shares with the next.

    Raises:
        UsageError: the image is not larger than a tile, or the tile is no multiple of f; the class has no tiling, or
            one that fails.
    """
    factor = downsampling_factor(vae)
    side = tile or sample_size(vae)
    if side % factor or not (side // factor * overlap).is_integer() or side // factor * overlap < 1:
        raise UsageError(
            f"tile: expected a multiple of f = {factor} and an overlap of whole latents, got {side} px, {overlap:.0%}"
        )
    if max(pixels.shape[2:]) <= side:
        raise UsageError(f"IMAGE: {pixels.shape[3]} x {pixels.shape[2]} px is not larger than a tile of {side} px")
    whole_vae, tiled_vae = copy.copy(vae), in_tiles(vae, side, overlap)
    whole_vae.use_tiling = False
    z = finite.encode(whole_vae, pixels).mean
    try:
        z_tiled = finite.encode(tiled_vae, pixels).mean
    except (ValueError, RuntimeError):  # AutoencoderKLHunyuanImage takes an image for a clip, Tiny is for 4 channels
        z_tiled = None
    whole = finite.decode(whole_vae, z).clamp(-1, 1)
    try:
        tiled = finite.decode(tiled_vae, z).clamp(-1, 1)
    except RuntimeError as reason:
        raise UsageError(f"tiling: {an(type(vae).__name__)} fails to decode in tiles: {first_line(reason)}") from reason
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
        latent_rms=None if z_tiled is None else float((z_tiled - z).square().mean().sqrt() / z.std()),
    )


def in_tiles(vae: Any, side: int, overlap: float) -> Any:
    """A copy that encodes and decodes in tiles; the weights are shared, the switches are not.

    Raises:
        UsageError: the class has no tiling, or one for another factor than this network's.
    """
    factor, tiled, name = downsampling_factor(vae), copy.copy(vae), type(vae).__name__
    try:
        tiled.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise UsageError(f"tiling: {an(name)} has none, as diffusers has it; expected another class") from error
    scale = getattr(tiled, "spatial_scale_factor", factor)  # of an AutoencoderTiny 2^out_channels, whatever f is
    if scale != factor:
        raise UsageError(f"tiling: that of {an(name)} is for f = {scale}; this one has f = {factor}, and would be cut")
    if hasattr(tiled, "tile_sample_min_size"):
        tiled.tile_sample_min_size, tiled.tile_latent_min_size = side, side // factor
        tiled.tile_overlap_factor = overlap
    else:
        for edge in ("height", "width"):
            setattr(tiled, f"tile_sample_min_{edge}", side)
            setattr(tiled, f"tile_latent_min_{edge}", side // factor)
            setattr(tiled, f"tile_sample_stride_{edge}", side - int(side // factor * overlap) * factor)
    return tiled


def _seams(height: int, width: int, side: int, overlap: float) -> torch.Tensor:
    """[H, W] bool: where one tile is blended into the next."""
    blend = int(side * overlap)
    step = side - blend
    down, right = torch.arange(height), torch.arange(width)
    blended_down, blended_right = ((line >= step) & (line % step < blend) for line in (down, right))
    return blended_down[:, None] | blended_right[None, :]
