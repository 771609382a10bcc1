"""The picture of a model card: originals above, their reconstructions below.

Legend: B images, C image channels, R side.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image

from ldm_vae.autoencoder import finite
from ldm_vae.data.transforms import to_uint8

PICTURE = "pictures/reconstruction.png"


@torch.no_grad()
def reconstruction_sheet(vae: Any, pixels: torch.Tensor) -> bytes:
    """pixels [B, C, R, R] in [-1, 1] => PNG of B columns and two rows."""
    pixels = pixels.to(vae.device, vae.dtype)
    decoded = finite.decode(vae, finite.encode(vae, pixels).mean)
    rows = [torch.cat(list(to_uint8(images.float().cpu())), dim=2) for images in (pixels, decoded)]
    sheet = torch.cat(rows, dim=1)  # [C, 2 R, B R]
    array = sheet[: 3 if sheet.shape[0] > 2 else 1].permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]).save(out, "PNG", optimize=True)
    return out.getvalue()
