"""Clips of any length, chunk by chunk: what comes out is that of the whole clip, in memory that does not depend on its
length.

Some classes work through a clip in chunks of their own and carry the ends of each layer's input to the next in caches:
here the caches outlive a call, and however the frames arrive, each chunk is the one that the class would make of the
whole clip. All others have statistics or attention over the whole clip, or see later frames; they are given it whole.

Legend: B batch, C image channels, c latent channels, T frames, t latent frames, H W pixels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.latents import Moments, at_least_fp32
from ldm_vae.autoencoder.lengths import check_frames, check_latent_frames

Run = Callable[[torch.Tensor, bool], torch.Tensor]
"""One chunk, and whether it is the first, through a network's encoder or decoder."""


@dataclass(frozen=True)
class Chunks:
    """A class that works in chunks.

    frames, latents: number of frames, and of latent frames, of its first chunk and of each later one.
    encoder, decoder: of a network, a run with empty caches: pixels => the encoder's [B, 2c, t, h, w], z => pixels.
    """

    frames: tuple[int, int]
    latents: tuple[int, int]
    encoder: Callable[[Any], Run]
    decoder: Callable[[Any], Run]


def _listed(vae: Any, part: str) -> list[None]:
    """Empty caches of AutoencoderKLWan and QwenImage, as many as the network's part has causal convolutions."""
    vae.clear_cache()
    return [None] * len(getattr(vae, part))


def _wan_encoder(vae: Any) -> Run:
    caches, patch = _listed(vae, "_enc_feat_map"), vae.config.get("patch_size")

    def run(pixels: torch.Tensor, first: bool) -> torch.Tensor:
        pixels = pixels if patch is None else patchify(pixels, patch_size=patch)
        found: torch.Tensor = vae.quant_conv(vae.encoder(pixels, feat_cache=caches, feat_idx=[0]))
        return found

    return run


def _wan_decoder(vae: Any) -> Run:
    caches, patch = _listed(vae, "_feat_map"), vae.config.get("patch_size")

    def run(z: torch.Tensor, first: bool) -> torch.Tensor:
        # Qwen-Image's decoder has no such argument: it tells by its caches
        told = {"first_chunk": first} if "is_residual" in vae.config else {}
        found = vae.decoder(vae.post_quant_conv(z), feat_cache=caches, feat_idx=[0], **told)
        found = found if patch is None else unpatchify(found, patch_size=patch)
        return found.clamp(min=-1.0, max=1.0)  # type: ignore[no-any-return]

    return run


def _kandinsky_encoder(vae: Any) -> Run:
    caches = vae.encoder.make_cache()
    return lambda pixels, first: vae.encoder(pixels, caches)


def _kandinsky_decoder(vae: Any) -> Run:
    caches = vae.decoder.make_cache()
    return lambda z, first: vae.decoder(z, caches)


CHUNKS = {
    "AutoencoderKLWan": Chunks((1, 4), (1, 1), _wan_encoder, _wan_decoder),
    "AutoencoderKLQwenImage": Chunks((1, 4), (1, 1), _wan_encoder, _wan_decoder),
    "Kandinsky6SRVAE": Chunks((17, 16), (5, 4), _kandinsky_encoder, _kandinsky_decoder),
}


def is_streamed(vae: Any) -> bool:
    """True where memory does not depend on a clip's length."""
    return type(vae).__name__ in CHUNKS and not getattr(vae, "use_tiling", False)


def encode_clip(vae: Any, pixels: Iterable[torch.Tensor]) -> Iterator[Moments]:
    """The frames of a clip, in parts [B, C, n, H, W] of any numbers n of frames => its moments, in parts [B, c, m, h,
    w] that together are those of the whole clip.

    Raises:
        UsageError: the clip ends at a length that the class would cut or pad.
    """
    if not is_streamed(vae):
        yield latents.encode(vae, torch.cat([*pixels], dim=2))
        return
    chunks = CHUNKS[type(vae).__name__]
    run, frames = chunks.encoder(vae), 0
    for part in _regrouped(pixels, *chunks.frames):
        first, frames = frames == 0, frames + part.shape[2]
        if part.shape[2] < chunks.frames[not first]:  # the last: before the class sees it
            check_frames(vae, frames)
        yield Moments.from_parameters(run(part.to(vae.dtype), first))


def decode_clip(vae: Any, z: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The latent frames of a clip, unscaled, in parts [B, c, n, h, w] => its frames, in parts [B, C, m, H, W] that
    together are those of the whole clip, fp32 and not clamped.

    Raises:
        UsageError: these are the latent frames of no clip.
    """
    if not is_streamed(vae):
        yield latents.decode(vae, torch.cat([*z], dim=2))
        return
    chunks = CHUNKS[type(vae).__name__]
    run, frames = chunks.decoder(vae), 0
    for part in _regrouped(z, *chunks.latents):
        first, frames = frames == 0, frames + part.shape[2]
        if part.shape[2] < chunks.latents[not first]:
            check_latent_frames(vae, frames)
        yield at_least_fp32(run(part.to(vae.dtype), first))


def _regrouped(parts: Iterable[torch.Tensor], first: int, later: int) -> Iterator[torch.Tensor]:
    """The same frames, in parts of `first` and then of `later` frames; the last may have fewer."""
    held: list[torch.Tensor] = []
    count, wanted = 0, first
    for part in parts:
        held.append(part)
        count += part.shape[2]
        if count < wanted:
            continue
        whole = torch.cat(held, dim=2) if len(held) > 1 else held[0]
        start = 0
        while count - start >= wanted:
            yield whole[:, :, start : start + wanted]
            start, wanted = start + wanted, later
        # a copy: a view would keep the whole part alive
        held, count = ([whole[:, :, start:].clone()], count - start) if start < count else ([], 0)
    if held:
        yield torch.cat(held, dim=2)
