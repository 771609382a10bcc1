"""The terms of the objective, one file each; the file name is the name in a config.

A file holds `Config(TermConfig)` whose `build` gives a module with an attribute `domain`:

- "pixels":  forward(pixels [B, C, H, W], target [B, C, H, W]) -> scalar, a mean over batch, channels and pixels;
- "alpha":   the same of alpha [B, 1, H, W], for images that have it (terms on pixels are then given the colour over a
             background, C = 3: ldm_vae/data/alpha.py);
- "clips":   the same of clips [B, C, T, H, W] where the others see their frames as images [B*T, C, H, W]; a run without
             clips is refused, one-frame clips among longer ones are not;
- "sounds":  the same of sounds [B, C, L], L samples; terms of "pixels" that are no terms of images alone (l1, l2,
             charbonnier) take them too;
- "latents": forward(reconstruction: ldm_vae.autoencoder.trainable.Reconstruction) -> scalar.

It may further have

- `of_sounds`: True of a term on pixels that takes samples of sounds [B, C, L] too, False of one on latents that does
  not;
- `needs`: "posterior" (a Gaussian q(z|x)) or "codes" (a codebook): a model without it is refused before the run starts;
- `figures()`: scalars of its own for the log, after a forward;
- `attach(network)`: called once with the TrainableAutoencoder, for a term that watches the network's inside;
- `after_update()`: called once per update, which may be several forwards (gradient accumulation): state moves here and
  not in forward; and `leave_out()`, called in its stead when the update was not taken (ldm_vae/core/micro_batches.py).

Every term is a mean per pixel value, so that a weight means the same at every resolution. Terms are computed in fp32.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ldm_vae.core.config import Part, Section


class Schedule(Section):
    """A factor on a weight, from 0 to 1, counted in images seen."""

    kind: Literal["linear", "cosine", "cyclic"] = "linear"
    """linear or cosine: one rise; cyclic: rises and falls back to 0 every `images` (Fu et al. 2019)."""
    start_images: int = Field(0, ge=0)
    """The factor is 0 until then."""
    images: int = Field(gt=0)
    """Length of the rise; of one cycle, if cyclic."""
    rise: float = Field(0.5, gt=0, le=1)
    """Share of a cycle in which the factor rises; for the rest of it, it is 1."""

    def factor(self, images_seen: int) -> float:
        """The factor after so many images."""
        since = images_seen - self.start_images
        if since < 0:
            return 0.0
        if self.kind == "cyclic":
            return min(1.0, since % self.images / (self.rise * self.images))
        progress = min(1.0, since / self.images)
        return 0.5 - 0.5 * math.cos(math.pi * progress) if self.kind == "cosine" else progress


class TermConfig(Part):
    """Knobs that every term has."""

    weight: float = 1.0
    """Factor of this term in the sum."""
    schedule: Schedule | None = None
    """A further factor that rises with the images seen: annealing of the KL, or a term that comes in late."""
    frames: int | None = Field(None, gt=0)
    """Frames of each clip that a term on pixels sees, chosen by key anew each time the clip comes; all if null. The
    cost of lpips falls with them, its expectation does not change."""

    def weight_at(self, images_seen: int) -> float:
        """The weight after so many images."""
        return self.weight * (1.0 if self.schedule is None else self.schedule.factor(images_seen))
