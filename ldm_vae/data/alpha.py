"""Alpha: images of four channels whose fourth is opacity, straight (colour is not multiplied by it).

The colour of a pixel that is fully transparent means nothing: it is black in every image that is read, and whatever
judges an image (losses, the adversary, metrics, the eye) sees composites over a background.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm_vae.core.errors import UsageError

CHANNELS = 4
HALF_LEVEL = 0.5 / 255  # an opacity below it is 0 in 8 bits
BACKGROUNDS = (0.0, 255.0)  # of metrics: black and white, the two ends; on white alone, distances of whole sets
SQUARE, LIGHT, DARK = 8, 255.0, 204.0  # of the checkerboard behind pictures: pixels a side, and its two greys


def without_hidden(image: torch.Tensor) -> torch.Tensor:
    """uint8 [4, H, W] => the same, black where it is fully transparent."""
    return torch.where(image[3:] > 0, image, torch.zeros_like(image))


def resampled(pixels: torch.Tensor, resample: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """pixels [..., 4, H, W] in [0, 1] => those of `resample`, run on premultiplied colour, in which no invisible colour
    bleeds into its neighbours (Porter & Duff, SIGGRAPH 1984); black where nothing is left to see."""
    colour, alpha = _parts(pixels)
    colour, alpha = _parts(resample(torch.cat([colour * alpha, alpha], dim=-3)))
    alpha = alpha.clamp(0, 1)  # bicubic weights overshoot
    visible = alpha >= HALF_LEVEL
    colour = (colour / alpha.clamp(min=HALF_LEVEL)).clamp(0, 1)
    return visible * torch.cat([colour, alpha], dim=-3)


def composite(pixels: torch.Tensor, background: torch.Tensor | float, low: float = -1.0) -> torch.Tensor:
    """pixels [..., 4, H, W] from `low` to its opposite end => colour over the background [..., 3, H, W].

    Args:
        background: a grey, or colours that broadcast to [..., 3, H, W].
        low: what 0 is: -1 of pixels in [-1, 1], 0 of those on the 0..255 scale.
    """
    colour, alpha = _parts(pixels)
    opacity = (alpha + 1) / 2 if low else alpha / 255
    found: torch.Tensor = background + opacity * (colour - background)
    return found


def _parts(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels[..., :3, :, :], pixels[..., 3:, :, :]


def visible(pixels: torch.Tensor, alpha: bool) -> torch.Tensor:
    """The picture of pixels [..., C, H, W] on the 0..255 scale: with alpha the colour over a checkerboard
    [..., 3, H, W], else the pixels themselves."""
    if not alpha:
        return pixels
    rows, columns = (torch.arange(side, device=pixels.device) // SQUARE for side in pixels.shape[-2:])
    light = (rows[:, None] + columns) % 2 == 0
    return composite(pixels.float(), torch.where(light, LIGHT, DARK), low=0.0).round().to(pixels.dtype)


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """images [B, C, H, W] as a network for photographs takes them [B, 3, H, W]: grey is repeated.

    Raises:
        UsageError: C is neither 1 nor 3.
    """
    if images.shape[1] not in (1, 3):
        raise UsageError(
            f"images: expected 1 or 3 channels, for a network of photographs, got {images.shape[1]}; of four with "
            "alpha, `alpha` says so, and they are seen as composites"
        )
    return images.expand(-1, 3, -1, -1)
