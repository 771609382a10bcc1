"""Sizes and kinds: what an autoencoder makes of an image, a clip or a sound, from a run without values.

Legend: C channels of an image or a sound, c latent channels, T frames, t latent frames, H W pixels, h w latent
positions, L samples, n latent positions of a sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import latents, signals
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.lengths import check_samples, hop_of, lengths_of
from ldm_vae.autoencoder.meta import on_meta, once, shared_without_values
from ldm_vae.core.errors import UsageError
from ldm_vae.core.terminal import print_note
from ldm_vae.core.text import an
from ldm_vae.core.validation import first_line

LARGEST_SAMPLE = 1024  # pixels: the largest that published configs of images say
UNSAID_SAMPLE = 512  # of AutoencoderTiny and AutoencoderDC, whose configs have no such key
POSITIONS = 8  # of the sounds that are tried
SIDES = (256, 512)  # of the images that are tried: the largest f is 64, and 256 leaves an RAE's patches whole


@dataclass(frozen=True)
class Geometry:
    """Of the images: in_channels C; side, where it takes and makes one size only (AutoencoderRAE). Of the latents:
    latent_channels c; factor f, pixels per position along one side, of sounds the hop; is_point, where there is no
    variance; field of the encoder's output that holds them."""

    in_channels: int
    latent_channels: int
    factor: int
    is_point: bool
    field: str
    side: int | None = None


@once
@torch.no_grad()
def geometry_of(vae: Any) -> Geometry:
    """The geometry of an autoencoder of diffusers' kind, by `encode` (and `decode`) of a copy without values.

    Raises:
        UsageError: it encodes no image, or where its family is of sounds no sound.
    """
    if is_of_sounds(vae):
        return _of_sounds(vae)
    with on_meta():
        empty = shared_without_values(vae)
        failed: Exception | None = None
        first = family_of(vae).first
        for channels in signals.channels_to_try(vae):
            try:
                shape = (1, channels) if first == 1 else (1, channels, first)
                images = [torch.empty(*shape, side, side) for side in SIDES]
                found = [latents.encode(empty, pixels) for pixels in images]
            except Exception as error:  # of another number of channels, or of another signal: any kind
                failed = failed or error
                continue
            (small, large), c = (moments.mean.shape[-1] for moments in found), int(found[0].mean.shape[1])
            field = signals.field_of(signals.encoded(empty, images[0]))
            if small == large:  # it resizes what it is given, and makes what that decodes to
                made = int(latents.decode(empty, found[0].mean).shape[-1])
                return Geometry(channels, c, made // small, found[0].is_point, field, made)
            return Geometry(channels, c, SIDES[0] // small, found[0].is_point, field)
    assert failed is not None
    raise UsageError(
        f"VAE: {an(type(vae).__name__)} encodes no image [B, C, H, W]: {first_line(failed)}; "
        "a class that takes images in another form needs a row in ldm_vae/autoencoder/families.py"
    )


def _of_sounds(vae: Any) -> Geometry:
    hop = hop_of(vae)
    with on_meta():
        empty, sounds = shared_without_values(vae), torch.empty(1, hop.channels, POSITIONS * hop.samples)
        field, moments = signals.field_of(signals.encoded(empty, sounds)), latents.encode(empty, sounds)
    return Geometry(hop.channels, int(moments.mean.shape[1]), hop.samples, moments.is_point, field)


def is_of_sounds(vae: Any) -> bool:
    """True for a class of sounds."""
    return family_of(vae).signal == "audio"


def only_images(vae: Any, name: str) -> None:
    """Raises UsageError for a class of sounds, where images and clips alone do; `name` is the argument's."""
    if is_of_sounds(vae):
        raise UsageError(f"{name}: expected an autoencoder of images or clips, got {an(type(vae).__name__)}, of sounds")


def image_channels(vae: Any) -> int:
    """C: channels of an image or a sound."""
    return geometry_of(vae).in_channels


def latent_channels(vae: Any) -> int:
    """c: channels of z."""
    return geometry_of(vae).latent_channels


def downsampling_factor(vae: Any) -> int:
    """f: pixels per latent position along one side; of sounds the hop, samples per position."""
    return geometry_of(vae).factor


def latent_size(vae: Any, *size: int) -> tuple[int, ...]:
    """(c, h, w) for images of a size (H, W), (c, t, h, w) for clips of a size (T, H, W), (c, n) for sounds of a size
    (L,)."""
    factor = downsampling_factor(vae)
    if len(size) == 1:
        return latent_channels(vae), size[0] // factor
    *frames, height, width = size
    return (latent_channels(vae), *map(lengths_of(vae).latent_frames, frames), height // factor, width // factor)


def step_of(vae: Any) -> int:
    """Pixels that sides of images are multiples of: f, times the side of the patches that pipelines make of latents."""
    return geometry_of(vae).factor * family_of(vae).patch


def sample_size(vae: Any, most: int = LARGEST_SAMPLE) -> int:
    """Side in pixels of the images that it was trained on, of `most` at most, in whole steps of f; 512 where its config
    does not say. Raises UsageError for a class of sounds."""
    only_images(vae, "VAE")
    geometry, step = geometry_of(vae), step_of(vae)
    if geometry.side is not None:
        return geometry.side
    # diffusers fills in its own default, 32 for an f8 network, where a config.json does not say
    said = {} if "sample_size" in vae.config.get("_use_default_values", ()) else vae.config
    side = said.get("sample_size", UNSAID_SAMPLE)
    side = min(side) if isinstance(side, list | tuple) else side  # height and width
    return max(step, min(most, int(side)) // step * step)


def resolution_of(asked: int | None, vae: Any, name: str, most: int = LARGEST_SAMPLE) -> int:
    """The resolution that was asked for, else the `sample_size` of the VAE called `name`, which is said on stderr.

    Raises:
        UsageError: the VAE does not take images of that side whole, or is of sounds.
    """
    only_images(vae, f"VAE {name}")
    resolution = sample_size(vae, most) if asked is None else asked
    check_resolution(resolution, vae)
    if asked is None:
        print_note(f"resolution: {resolution} px, by VAE {name}; --resolution sets another")
    return resolution


def only_kl(vae: Any, what: str) -> None:
    """Raises UsageError unless the VAE is an AutoencoderKL; `what` is the argument that asked for more."""
    from diffusers import AutoencoderKL  # here, as in codebooks.py

    if not isinstance(vae, AutoencoderKL):
        raise UsageError(f"{what}: expected an AutoencoderKL, got {an(type(vae).__name__)}")


def some_latents(vae: Any, count: int = 1) -> torch.Tensor:
    """Standard normal z [B, c, h, w] that it decodes: of 4 x 4 positions, or of its only number of them; of a class
    that takes no images [B, c, t, h, w], of its shortest clip, or [B, c, n]. The same at every call."""
    geometry = geometry_of(vae)
    side = 4 if geometry.side is None else geometry.side // geometry.factor
    if is_of_sounds(vae):
        positions: tuple[int, ...] = (POSITIONS,)
    else:
        positions = (side, side) if family_of(vae).takes_images else (lengths_of(vae).latent_first, side, side)
    shape = (count, geometry.latent_channels, *positions)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def some_size(vae: Any, frames: int | None = None) -> tuple[int, ...]:
    """(H, W) of an image that it takes, (T, H, W) of a clip of so many frames, or of the shortest of a class that takes
    no images; (L,) of a sound."""
    geometry = geometry_of(vae)
    if is_of_sounds(vae):
        return (POSITIONS * geometry.factor,)
    if frames is None and not family_of(vae).takes_images:
        frames = lengths_of(vae).first
    side = geometry.side or 8 * geometry.factor
    return (side, side) if frames is None else (frames, side, side)


def check_resolution(resolution: int, vae: Any) -> None:
    """Raises UsageError unless the autoencoder takes images of this side whole: a multiple of its f, or its only
    side; sounds of so many samples."""
    if is_of_sounds(vae):
        check_samples(vae, resolution, "samples")
        return
    geometry, step = geometry_of(vae), step_of(vae)
    if geometry.side is not None and resolution != geometry.side:
        raise UsageError(f"resolution: {an(type(vae).__name__)} makes {geometry.side} px only, got {resolution}")
    if resolution <= 0 or resolution % step:
        near = max(step, round(resolution / step) * step)
        of = "f" if step == geometry.factor else f"{geometry.factor} x {step // geometry.factor}"
        raise UsageError(
            f"resolution: expected a positive multiple of {of} = {step}, got {resolution}; {near} would do"
        )
