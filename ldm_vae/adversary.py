"""The adversarial game: the losses of both sides, and when each of them plays.

Two methods, not a mode flag. `generator_loss` is what the autoencoder minimises, `discriminator_loss` what the
discriminator does. Legend: B batch, H' W' patches; logits are [B, 1, H', W'].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ldm_vae.config import Section


class AdversaryConfig(Section):
    """The adversarial term."""

    weight: float = 0.5
    """Factor of the generator loss; with `adaptive`, relative to the pixel terms' gradient (0: no adversary)."""
    adaptive: bool = True
    """Balance the gradients of pixel terms and adversary at the last layer (Esser et al. 2021, eq. 7). A fixed weight
    is on the scale of per-pixel means: latent-diffusion's divided by C * H * W."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """Hinge (Lim & Ye 2017), vanilla (Goodfellow et al. 2014, with the linear generator loss of latent-diffusion), or
    non-saturating."""
    start_images: int = 0
    """Images seen before the autoencoder is trained against the discriminator."""
    warmup_images: int = 0
    """Images before start_images in which the discriminator already learns, unseen by the autoencoder."""

    @property
    def enabled(self) -> bool:
        return self.weight > 0


class Adversary:
    """The rules of the game."""

    def __init__(self, config: AdversaryConfig) -> None:
        self.config = config

    def generator_plays(self, images_seen: int) -> bool:
        return self.config.enabled and images_seen >= self.config.start_images

    def discriminator_plays(self, images_seen: int) -> bool:
        return self.config.enabled and images_seen >= self.config.start_images - self.config.warmup_images

    def generator_loss(self, fake_logits: torch.Tensor) -> torch.Tensor:
        """What the autoencoder minimises, from the logits of its reconstructions."""
        if self.config.loss == "non_saturating":
            return F.softplus(-fake_logits).mean()
        return -fake_logits.mean()

    def discriminator_loss(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """What the discriminator minimises; 1.0 (hinge) or ln 2 (others) means that it knows nothing."""
        if self.config.loss == "hinge":
            return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
        return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
