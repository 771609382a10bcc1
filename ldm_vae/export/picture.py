"""The picture of a model card: originals above, their reconstructions below; of clips the middle frames, of sounds
spectrograms.

Legend: B images, C channels of an image or a sound, T frames, R side, L samples.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.core.pictures import png, sheet, to_image
from ldm_vae.data.alpha import visible
from ldm_vae.data.transforms import to_uint8
from ldm_vae.perceptual import spectrogram

PICTURE = "pictures/reconstruction.png"


@torch.no_grad()
def reconstruction_sheet(vae: Any, pixels: torch.Tensor, rate: int | None = None) -> bytes:
    """pixels [B, C, R, R] or [B, C, T, R, R] in [-1, 1], or samples [B, C, L] => PNG of B columns and two rows.

    rate: of sounds, in hertz.
    """
    pixels = pixels.to(vae.device, vae.dtype)
    decoded = finite.decode(vae, finite.encode(vae, pixels).mean)
    both = torch.cat([pixels, decoded]).float().cpu()
    if rate is not None:
        shown = torch.stack([255 * spectrogram.picture(sound, rate)[None] for sound in both])
    else:
        shown = visible(to_uint8(both if both.ndim == 4 else both[:, :, both.shape[2] // 2]), has_alpha(vae))
    both = sheet(shown, len(pixels), gap=0)
    return png(to_image(both[:3]))
