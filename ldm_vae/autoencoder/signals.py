"""Signals: images, clips and sounds on their way into a network and out of it, as its family has it.

Legend: B batch, C channels of an image or a sound, T frames, H W pixels, L samples, c latent channels, t h w latent
positions of images and clips, n of sounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ldm_vae.autoencoder.families import family_of
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in [0, 1]


def frames_of(clips: torch.Tensor) -> torch.Tensor:
    """Clips [B, C, T, H, W] => their frames [B*T, C, H, W], which image terms, metrics and discriminators judge; images
    and sounds as they are."""
    return clips.transpose(1, 2).flatten(0, 1) if clips.ndim == 5 else clips


def clips_of(frames: torch.Tensor, count: int) -> torch.Tensor:
    """Frames [B*T, C, H, W], count T of each clip => clips [B, C, T, H, W]."""
    # contiguous: some operations take no other layout of five dimensions
    return frames.view(-1, count, *frames.shape[1:]).transpose(1, 2).contiguous()


def spread_frames(draws: torch.Tensor, count: int, wanted: int) -> torch.Tensor:
    """Places of `wanted` of the count T frames of each clip among their frames [B*T]: [B * min(wanted, T)].

    They are evenly spread from a start that the clip's draw [B] in (0, 1) decides (systematic sampling, Madow & Madow
    1944): each frame is as likely, so the mean over them has the mean over all as its expectation.
    """
    wanted = min(wanted, count)
    steps = torch.arange(wanted, device=draws.device)
    # a draw may round to 1
    chosen = ((draws[:, None] + steps) * (count / wanted)).long().clamp(max=count - 1)
    return (chosen + count * torch.arange(len(draws), device=draws.device)[:, None]).flatten()


def is_by_frame(vae: Any) -> bool:
    """True where the frames of a clip go through the network as a batch: a class of images, or of such clips."""
    family = family_of(vae)
    return family.folded or family.signal == "image"


def channels_to_try(vae: Any) -> Iterator[int]:
    """Numbers of channels to try: what the config says, which a class of patches counts in another way."""
    names = ("in_channels", "num_channels", "audio_channels", "input_channels")
    said = [getattr(vae.config, name, None) for name in names]
    usual = [1, 2] if family_of(vae).signal == "audio" else [3, 4, 1]
    yield from dict.fromkeys([int(number) for number in said if number] + usual)


# --- into a network ---------------------------------------------------------------------------------------------------


def encoded(vae: Any, pixels: torch.Tensor) -> Any:
    """Output of the network's `encode` of pixels or samples."""
    return vae.encode(enter(vae, pixels), **dict(family_of(vae).mean_by))


def enter(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """pixels [B, C, H, W] or [B, C, T, H, W] in [-1, 1], or samples [B, C, L], full scale at -1 and 1 => what the
    network's `encode` takes; an image is a clip of one frame for a class of clips.

    Raises:
        UsageError: sounds, of a network of images or clips; or the other way round.
    """
    family = family_of(vae)
    of_sounds = family.signal == "audio"
    if (pixels.ndim == 3) != of_sounds:
        expected = "sounds [B, C, L]" if of_sounds else "images [B, C, H, W] or clips [B, C, T, H, W]"
        raise UsageError(f"encode: expected {expected} for {an(type(vae).__name__)}, got {list(pixels.shape)}")
    _forget(vae)
    if family.values != "signed":
        pixels = pixels * 0.5 + 0.5
    if family.values == "imagenet":
        mean, std = (_per_channel(one, pixels) for one in (MEAN, STD))
        pixels = (pixels - mean) / std
    if is_by_frame(vae):
        return frames_of(pixels)
    if family.signal == "video" and pixels.ndim == 4:
        pixels = pixels[:, :, None]
    if family.padded:
        more = vae.temporal_compression_ratio - 1
        pixels = torch.cat([pixels[:, :, :1].expand(-1, -1, more, -1, -1), pixels], dim=2)
    if family.frames_first:
        _tile_in_time(vae, *pixels.shape[3:])
    return pixels


def enter_latents(vae: Any, z: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """z [B, c, h, w], [B, c, t, h, w] or [B, c, n] => what the network's `decode` takes, and its keywords."""
    family = family_of(vae)
    _forget(vae)
    if is_by_frame(vae):
        return frames_of(z), {"num_frames": z.shape[2] if z.ndim == 5 else 1} if family.folded else {}
    if family.signal == "video" and z.ndim == 4:
        z = z[:, :, None]
    if family.frames_first:
        ratio = vae.spatial_compression_ratio
        _tile_in_time(vae, z.shape[3] * ratio, z.shape[4] * ratio)
    if getattr(getattr(vae, "config", None), "timestep_conditioning", False):
        return z, {"temb": z.new_zeros(len(z))}  # the pipelines' decode_timestep by default: z without noise
    return z, {}


def _forget(vae: Any) -> None:
    """Take away what a call that failed has left in the layers of an AutoencoderKLMagvit."""
    if hasattr(vae, "_clear_conv_cache"):
        vae._clear_conv_cache()


def _tile_in_time(vae: Any, height: int, width: int) -> None:
    """AutoencoderKLAllegro works in tiles alone, which leave the rest of a frame at zero: let them be whole frames, of
    its own number of frames."""
    vae.enable_tiling()
    vae.kernel, vae.stride = (vae.kernel[0], height, width), (vae.stride[0], height, width)


def injects_noise(vae: Any) -> bool:
    """True for an AutoencoderKLLTXVideo whose decoder adds noise of the global generator."""
    return any(getattr(getattr(vae, "config", None), "decoder_inject_noise", None) or ())


@contextlib.contextmanager
def same_draws(vae: Any, device: torch.device) -> Iterator[None]:
    """Around a decode: noise that it injects is the same at every call, and the global random state stays."""
    if not injects_noise(vae):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


# --- out of it --------------------------------------------------------------------------------------------------------


def held_by(encoded: Any) -> Any:
    """Output of an `encode`: a posterior, or latents."""
    return encoded[0] if isinstance(encoded, tuple) else getattr(encoded, field_of(encoded))


def field_of(encoded: Any) -> str:
    """The field of an `encode`'s output that holds latents: `latent_dist`, `latent` or `latents`; `[0]` of a tuple.
    Raises UsageError where there is none."""
    if isinstance(encoded, tuple) and torch.is_tensor(encoded[0]):
        return "[0]"
    if hasattr(getattr(encoded, "latent_dist", None), "mode"):
        return "latent_dist"
    for name in ("latent", "latents"):
        if torch.is_tensor(getattr(encoded, name, None)):
            return name
    given = ", ".join(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
    raise UsageError(f"VAE: its encode gives {given}; expected latent_dist with a mode, latent or latents")


def leave(vae: Any, decoded: Any, frames: int | None) -> torch.Tensor:
    """Output of the network's `decode` => pixels in [-1, 1]: [B, C, T, H, W] of so many latent frames, or images; of
    sounds samples [B, C, L]."""
    family = family_of(vae)
    pixels: torch.Tensor = decoded if torch.is_tensor(decoded) else decoded.sample
    if is_by_frame(vae):
        pixels = pixels if frames is None else clips_of(pixels, frames)
    elif family.signal == "video":
        pixels = pixels.transpose(1, 2) if family.frames_first else pixels
        pixels = pixels if frames is not None else pixels[:, :, 0]
    if family.values == "imagenet":
        mean, std = (_per_channel(one, pixels) for one in (MEAN, STD))
        pixels = pixels * std + mean
    return pixels if family.values == "signed" else pixels * 2.0 - 1.0


def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(values).view(-1, *(1,) * (like.ndim - 2))
