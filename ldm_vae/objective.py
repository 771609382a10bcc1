"""The objective: named terms times their weights. The dict that is summed is the dict that is logged.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ldm_vae.autoencoder import Reconstruction
from ldm_vae.errors import UsageError
from ldm_vae.losses import TermConfig

Logs = dict[str, torch.Tensor]


class Objective(nn.Module):
    """Terms on pixels (their gradient stops at the reconstruction) and terms on latents (it reaches the encoder).

    One module, so that the few parameters a term may own (a learned log-variance, a projection) are in the optimiser,
    the EMA and the checkpoint.
    """

    def __init__(self, terms: Mapping[str, TermConfig], outline: bool = False) -> None:
        """`outline`: without the weights that a term would load, to count its cost."""
        super().__init__()
        self.configs = dict(terms)
        built = {name: config.outline() if outline else config.build() for name, config in terms.items()}
        self.terms = nn.ModuleDict(built)
        if not any(term.domain == "pixels" for term in self.terms.values()):
            raise UsageError(f"losses: expected at least one term on pixels, got {', '.join(terms) or 'none'}")

    def pixel_terms(
        self, pixels: torch.Tensor, target: torch.Tensor, images_seen: int = 0
    ) -> tuple[torch.Tensor, Logs]:
        """Weighted sum of the terms on pixels [B, C, H, W] (fp32, in [-1, 1]), and each term by name."""
        losses = {name: term(pixels, target) for name, term in self.terms.items() if term.domain == "pixels"}
        return self._sum(losses, images_seen, pixels)

    def latent_terms(self, reconstruction: Reconstruction, images_seen: int = 0) -> tuple[torch.Tensor, Logs]:
        """Weighted sum of the terms on latents, and each term by name."""
        losses = {name: term(reconstruction) for name, term in self.terms.items() if term.domain == "latents"}
        total, logs = self._sum(losses, images_seen, reconstruction.pixels)
        nats = reconstruction.moments.kl().detach().sum() / len(reconstruction.pixels)
        return total, logs | {"kl_nats_per_image": nats}

    def _sum(self, losses: Logs, images_seen: int, like: torch.Tensor) -> tuple[torch.Tensor, Logs]:
        total = like.new_zeros(())
        for name, loss in losses.items():
            total = total + self.configs[name].weight_at(images_seen) * loss
        return total, {f"loss/{name}": loss.detach() for name, loss in losses.items()}
