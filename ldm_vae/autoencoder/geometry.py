"""Sizes and kinds: what an autoencoder's config says of its images."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL

from ldm_vae.core.errors import UsageError


def downsampling_factor(vae: Any) -> int:
    """f: pixels per latent position along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def sample_size(vae: Any) -> int:
    """Side in pixels of the images that it was trained on; 512 where its config does not say (AutoencoderTiny)."""
    return int(vae.config.get("sample_size", 512))


def only_kl(vae: Any, what: str) -> None:
    """Raises UsageError unless the VAE is an AutoencoderKL; `what` is the argument that asked for more."""
    if not isinstance(vae, AutoencoderKL):
        raise UsageError(f"{what}: expected an AutoencoderKL, got a {type(vae).__name__}")


def check_resolution(resolution: int, factor: int) -> None:
    """Raises UsageError unless `resolution` is a positive multiple of the downsampling factor f."""
    if resolution <= 0 or resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise UsageError(f"resolution: expected a positive multiple of f = {factor}, got {resolution}; {near} would do")
