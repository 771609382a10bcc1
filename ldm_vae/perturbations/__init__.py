"""Perturbations of the latents between encoder and decoder in training, one file each; the file name is the name.

A file holds `Config(PerturbationConfig)` whose `build` gives a module with

- `noise_channels(c)`: how many channels of keyed noise it needs for c latent channels;
- `forward(latents [B, c, h, w], target [B, C, H, W], draw: Draw) -> (latents, target)`: what is decoded instead, and
  what the decoded image is then compared with.

They are applied in the order of the config, one with an attribute `resizes` after all others, once the latent was
sampled. Encoding, validation and export know nothing of them.
"""

from __future__ import annotations

from ldm_vae.autoencoder.trainable import Draw as Draw  # what a perturbation is called with
from ldm_vae.core.config import Part


class PerturbationConfig(Part):
    """Knobs that every perturbation has: its kind."""
