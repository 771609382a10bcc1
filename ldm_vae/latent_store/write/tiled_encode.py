"""Tiled encoding of images that are too large for the memory: overlapping tiles, blended where they overlap.

All tiles have one shape, the last of a row is moved inwards rather than cut short, so a convolution sees the same sizes
everywhere. What tiling changes is what looks further than the overlap: group norms take their statistics per tile, and
attention sees its tile only. `seam_error` measures that.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions, f downsampling factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.meta import on_meta, without_values
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an


def check_tile(tile: int, overlap: int, vae: Any) -> None:
    """Raises UsageError unless both are multiples of f and the overlap is at most half of the tile, and the VAE takes
    images of any size."""
    geometry = geometry_of(vae)
    factor = geometry.factor
    if geometry.side is not None:
        raise UsageError(
            f"tile: {an(type(vae).__name__)} encodes images of {geometry.side} px only, and no parts of one"
        )
    if tile < factor or tile % factor:
        raise UsageError(f"tile: expected a positive multiple of f = {factor}, got {tile}")
    if overlap < 0 or overlap % factor or overlap > tile // 2:
        raise UsageError(f"tile_overlap: expected a multiple of f = {factor} up to {tile // 2}, got {overlap}")


def check_own_tiles(vae: Any) -> None:
    """Raises UsageError where a network works in tiles, or in chunks of frames, that its class alone does not tell: a
    store records none of these."""
    family = family_of(vae)
    if family.frames_first:  # AutoencoderKLAllegro's are set at each call (signals.py)
        return
    if not family.tiled and getattr(vae, "use_tiling", False):
        raise UsageError("vae: its tiling is on, which a store does not record: `vae.disable_tiling()`, or give `tile`")
    if family.signal == "video":
        # a class of clips has chunks of its own without tiles too: HunyuanVideo's blend over time, CogVideoX's do not
        parts = ("framewise", "num_frames", "frames_batch") + (("til",) if family.tiled else ())
        with on_meta():
            own = vars(without_values(vae)).items()
        named = {name: value for name, value in own if any(part in name for part in parts)}
        if changed := [name for name, value in named.items() if value != getattr(vae, name)]:
            raise UsageError(
                f"vae: its {changed[0]} is {getattr(vae, changed[0])}, where {an(type(vae).__name__)} has "
                f"{named[changed[0]]}, which a store does not record: load it again"
            )


def tile_of(tile: int | None, overlap: int | None, factor: int) -> tuple[int, int] | None:
    """(tile, overlap) from what a user gave; the default overlap is a quarter of the tile.

    Raises:
        UsageError: an overlap without a tile.
    """
    if tile is None:
        if overlap is not None:
            raise UsageError("--tile_overlap: has no effect without --tile")
        return None
    return tile, tile // 4 // factor * factor if overlap is None else overlap


def encode_tiled(
    encode: Callable[[torch.Tensor], Moments], pixels: torch.Tensor, tile: int, overlap: int, factor: int
) -> Moments:
    """pixels [B, C, H, W], or of clips [B, C, T, H, W], of the type that `encode` takes => moments [B, c, h, w] or [B,
    c, t, h, w], tile by tile; the sides are multiples of f."""
    height, width = pixels.shape[-2:]
    size = (min(tile, height) // factor, min(tile, width) // factor)
    window = _window(size, overlap // factor)
    total: torch.Tensor | None = None
    weight = torch.zeros((height // factor, width // factor))
    for top, left in itertools.product(*(_starts(side, tile, overlap, factor) for side in (height, width))):
        moments = encode(pixels[..., top : top + tile, left : left + tile])
        both = torch.cat([moments.mean, moments.logvar], dim=1)
        if total is None:
            total = both.new_zeros((*both.shape[:-2], height // factor, width // factor))
            window, weight = window.to(both.device), weight.to(both.device)
        at = (slice(top // factor, top // factor + size[0]), slice(left // factor, left // factor + size[1]))
        total[..., at[0], at[1]] += both * window
        weight[at] += window
    assert total is not None
    return Moments.from_parameters(total / weight)


def _starts(side: int, tile: int, overlap: int, factor: int) -> list[int]:
    """Start of each tile in pixels: multiples of f, spread evenly from 0 to the end, overlapping by at least
    `overlap`."""
    if side <= tile:
        return [0]
    # the fewest tiles that cover the side; rounding keeps the overlap, since tile - overlap is a multiple of f
    count = -(-(side - overlap) // (tile - overlap))
    span = (side - tile) // factor
    return [round(number * span / (count - 1)) * factor for number in range(count)]


def _window(size: tuple[int, int], overlap: int) -> torch.Tensor:
    """Weights [h, w]: ramps over the overlap at every side; where only one tile is, its weight cancels."""

    def ramp(length: int) -> torch.Tensor:
        place = torch.arange(length) + 1.0
        return torch.minimum(place, place.flip(0)).clamp(max=overlap + 1.0)

    return ramp(size[0])[:, None] * ramp(size[1])[None, :]


@torch.no_grad()
def seam_error(vae: Any, pixels: torch.Tensor, tile: int, overlap: int, factor: int) -> tuple[float, float]:
    """Deviation of tiled means [B, c, h, w] from the whole image's: (root mean square, largest), both relative to the
    standard deviation of the whole image's."""
    whole = finite.encode(vae, pixels).mean
    tiled = encode_tiled(lambda part: finite.encode(vae, part), pixels, tile, overlap, factor).mean
    scale = whole.std()
    return float((tiled - whole).square().mean().sqrt() / scale), float((tiled - whole).abs().max() / scale)
