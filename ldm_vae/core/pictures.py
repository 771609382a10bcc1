"""Pictures as files: tensors to PNG, and several of them on one sheet.

Legend: N images, C channels, T frames, H W sides, R side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor
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


STRIP = 16  # pixels of height of a label


def labelled(images: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """Images [N, C, H, W] on the 0..255 scale => [N, C, STRIP + H, W], its label black on white above each; one that is
    too long for W pixels is cut."""
    font, (_, channels, _, width) = ImageFont.load_default(11), images.shape
    strips = []
    for label in labels:
        while font.getlength(label) > width and len(label) > 1:
            label = f"{label.removesuffix('…')[:-1]}…"
        strip = Image.new("L", (width, STRIP), 255)
        ImageDraw.Draw(strip).text((0, 1), label, fill=0, font=font)
        strips.append(pil_to_tensor(strip).expand(channels, -1, -1))
    return torch.cat([torch.stack(strips).to(images), images], dim=2)
