"""Pictures as files: tensors to PNG, and several of them on one sheet.

Legend: N images, C channels, T frames, H W sides, R side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from ldm_vae.core import atomic_io


def to_image(pixels: torch.Tensor) -> Image.Image:
    """pixels [C, H, W] on the 0..255 scale => a Pillow image; of 2 channels the first, of more than 4 the first 3."""
    channels = pixels.shape[0] if pixels.shape[0] in (3, 4) else 3 if pixels.shape[0] > 4 else 1
    array = pixels[:channels].round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def png(image: Image.Image, *later: Image.Image) -> bytes:
    """The file's content, lossless; with later frames an animated PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **{"save_all": True, "append_images": later} if later else {})
    return buffer.getvalue()


def save(pixels: torch.Tensor, path: Path) -> None:
    """Write `to_image(pixels)` to a PNG file, of a clip [C, T, H, W] its frames, whole or not at all."""
    frames = pixels.unbind(1) if pixels.ndim == 4 else [pixels]
    atomic_io.replace(path, atomic_io.data(png(*map(to_image, frames))))


def sheet(
    images: torch.Tensor | Sequence[torch.Tensor], columns: int, *, gap: int = 4, value: int = 255
) -> torch.Tensor:
    """Images [N, C, R, R] of one shape => one picture [C, ...] of so many columns, `gap` pixels of `value` around each
    image."""
    grid: torch.Tensor = make_grid(images, nrow=columns, padding=gap, pad_value=value)
    return grid[: images[0].shape[0]]  # make_grid makes three channels of one
