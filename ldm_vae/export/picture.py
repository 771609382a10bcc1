"""The picture of a model card: originals above, their reconstructions below; of clips the middle frames.

Legend: B images, C image channels, T frames, R side.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.core.pictures import png, sheet, to_image
from ldm_vae.data.alpha import visible
from ldm_vae.data.transforms import to_uint8

PICTURE = "pictures/reconstruction.png"


@torch.no_grad()
def reconstruction_sheet(vae: Any, pixels: torch.Tensor) -> bytes:
    """pixels [B, C, R, R] or [B, C, T, R, R] in [-1, 1] => PNG of B columns and two rows."""
    pixels = pixels.to(vae.device, vae.dtype)
    decoded = finite.decode(vae, finite.encode(vae, pixels).mean)
    both = torch.cat([pixels, decoded]).float().cpu()
    shown = visible(to_uint8(both if both.ndim == 4 else both[:, :, both.shape[2] // 2]), has_alpha(vae))
    both = sheet(shown, len(pixels), gap=0)
    return png(to_image(both[:3]))
