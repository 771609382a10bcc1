"""What may happen to the latents between encoder and decoder while training, one file each; the file name is the name.

A file holds `Config(PerturbationConfig)` whose `build` gives a module with

- `noise_channels(c)`: how many channels of keyed noise it needs for c latent channels;
- `forward(latents [B, c, h, w], target [B, C, H, W], draw: Draw) -> (latents, target)`: what is decoded instead, and
  what the decoded image is then compared with.

They are applied in the order of the config, one with an attribute `resizes` after all others, once the latent was
sampled. Encoding, validation and export know nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.config import Part


@dataclass(frozen=True)
class Draw:
    """What a perturbation may draw from: noise [B, n, h, w] standard normal, keyed per image, so it depends neither on
    the rank nor on a resume; images [B, C, H, W] as encoded; images_seen keys what is drawn for the whole batch."""

    noise: torch.Tensor
    images: torch.Tensor
    images_seen: int

    def uniform(self, channel: int) -> torch.Tensor:
        """One number in (0, 1) per image [B], from the first position of a channel of the noise."""
        chances: torch.Tensor = torch.special.ndtr(self.noise[:, channel, 0, 0])
        return chances


class PerturbationConfig(Part):
    """What every perturbation has: its kind."""

    def outline(self, seed: int) -> Any:
        """The same module without weights that would have to be loaded: for counting its cost."""
        return self.build(seed)
