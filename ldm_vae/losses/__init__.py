"""The terms of the objective, one file each; the file name is the name in a config.

A file holds `Config(TermConfig)` whose `build` gives a module with an attribute `domain`:

- "pixels":  forward(pixels [B, C, H, W], target [B, C, H, W]) -> scalar, a mean over batch, channels and pixels;
- "latents": forward(reconstruction: ldm_vae.autoencoder.Reconstruction) -> scalar.

Every term is a mean per pixel value, so that a weight means the same at every resolution. Terms are computed in fp32.
"""

from __future__ import annotations

from typing import Any

from ldm_vae.config import Part


class TermConfig(Part):
    """What every term has."""

    weight: float = 1.0
    """Factor of this term in the sum."""

    def outline(self) -> Any:
        """The same module without weights that would have to be loaded: for counting its cost."""
        return self.build()

    def weight_at(self, images_seen: int) -> float:
        """The weight after so many images; a schedule overrides this."""
        return self.weight
