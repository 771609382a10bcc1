"""diffusers.AutoencoderKL: a Gaussian posterior over continuous latents."""

from __future__ import annotations

from ldm_vae.autoencoder.config import AutoencoderConfig as Config

__all__ = ["Config"]
