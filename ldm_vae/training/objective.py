"""The objective: named terms times their weights. The dict that is summed is the dict that is logged.

Legend: B batch, C channels of an image or a sound, T frames of a clip, H W pixels, L samples of a sound, c latent
channels, h w latent positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder.geometry import is_of_sounds
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core import distributed
from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig

Logs = dict[str, torch.Tensor]

ACTIVE = 0.01  # variance of the posterior mean over the data above which a unit is active (Burda et al., ICLR 2016)


class Objective(nn.Module):
    """Terms on pixels (their gradient stops at the reconstruction) and terms on latents (it reaches the encoder).

    One module, so that the few parameters a term may own (a learned log-variance, a projection) and its state (a
    controller's) are in the optimiser, averaged, and in the checkpoint.
    """

    def __init__(self, terms: Mapping[str, TermConfig], outline: bool = False) -> None:
        """`outline`: without the weights that a term would load, to count its cost."""
        super().__init__()
        self.configs = dict(terms)
        built = {name: config.outline() if outline else config.build() for name, config in terms.items()}
        self.terms = nn.ModuleDict(built)
        if not any(term.domain in ("pixels", "sounds") for term in self.terms.values()):
            raise UsageError(f"losses: expected at least one term on pixels, got {', '.join(terms) or 'none'}")
        for name, term in self.terms.items():
            if terms[name].frames is not None and term.domain not in ("pixels", "alpha"):
                raise UsageError(f"losses.{name}.frames: is for terms on single frames, this one is on {term.domain}")

    def attach(self, network: TrainableAutoencoder) -> None:
        """Tell the terms what they will see; raises UsageError when one needs what the model does not give."""
        gives = network.bottleneck.gives
        if network.alpha and self.likelihood is not None:
            raise UsageError(
                f"losses.{self.likelihood}: is a likelihood of all values of an image, and with data.alpha colour is "
                "seen over a background; l1 or l2 would do"
            )
        sounds = is_of_sounds(network.vae)
        for name, term in self.terms.items():
            if sounds and not getattr(term, "of_sounds", term.domain in ("sounds", "latents")):
                raise UsageError(f"losses.{name}: is of images, and this run has sounds; l1 or l2 would do")
            if term.domain == "sounds" and not sounds:
                raise UsageError(f"losses.{name}: is of sounds, and this run has none; l1 or l2 would do")
            if term.domain == "alpha" and not network.alpha:
                raise UsageError(f"losses.{name}: expected images with alpha; data.alpha: true says that they have it")
            needs = getattr(term, "needs", gives)
            if needs != gives:
                kinds = {"posterior": "a posterior (kl)", "codes": "codes (vq)", "point": "points (tiny)"}
                raise UsageError(f"losses.{name}: expected a model that gives {kinds[needs]}, got {kinds[gives]}")
            if hasattr(term, "attach"):
                self._term(name).attach(network)

    def pixel_terms(
        self, pixels: torch.Tensor, reconstruction: Reconstruction, images_seen: int = 0
    ) -> tuple[torch.Tensor, Logs]:
        """Weighted sum of the terms on pixels, on alpha, on clips and on sounds, and each term by name.

        pixels: those of the reconstruction [B*T, C, H, W] (fp32, in [-1, 1]), or its samples [B, C, L], with the graph
        that gradients go back through.
        """
        both = (pixels, reconstruction.target)
        domains = {name: str(term.domain) for name, term in self.terms.items()}
        # of images with alpha the terms on pixels see composites, so that colour counts as far as it can be seen
        views = {
            domain: [reconstruction.seen(one, domain) for one in both]
            for domain in {"pixels", "clips", "sounds"}.intersection(domains.values())
        }
        if reconstruction.background is not None:
            views["alpha"] = [one[:, 3:] for one in both]
        losses = {
            name: self.terms[name](*(reconstruction.some(view, self.configs[name].frames) for view in views[domain]))
            for name, domain in domains.items() if domain in views
        }  # fmt: skip
        return self._sum(losses, images_seen, pixels)

    def latent_terms(self, reconstruction: Reconstruction, images_seen: int = 0) -> tuple[torch.Tensor, Logs]:
        """Weighted sum of the terms on latents, and each term by name; what the latent carries."""
        losses = {name: term(reconstruction) for name, term in self.terms.items() if term.domain == "latents"}
        total, logs = self._sum(losses, images_seen, reconstruction.pixels)
        if not reconstruction.moments.is_point:
            logs |= rate(reconstruction.moments, reconstruction.images)
        return total, logs

    def after_update(self) -> None:
        """Move the state of the terms that have one, by all micro-batches of an update that was taken."""
        self._tell("after_update")

    def leave_out(self) -> None:
        """Forget an update that was not taken."""
        self._tell("leave_out")

    def _tell(self, hook: str) -> None:
        for term in self.terms.values():
            if hasattr(term, hook):
                getattr(term, hook)()

    @torch.no_grad()
    def bound(self, logs: Logs, images: torch.Tensor) -> Logs:
        """The evidence lower bound, where a likelihood is among the terms and the latent has a rate, from what they
        logged: nats per image, and its negative in bits per dimension (pixel value)."""
        # two likelihoods of one image are none, and a codebook has no rate: then there is no bound
        name = self.likelihood
        if name is None or "kl_nats_per_image" not in logs:
            return {}
        values = images[0].numel()
        nats = self._term(name).nats_per_value(logs[f"loss/{name}"])
        cost = nats * values + logs["kl_nats_per_image"]
        return {"elbo/nats_per_image": -cost, "elbo/bits_per_dimension": cost / values / math.log(2)}

    @property
    def likelihood(self) -> str | None:
        """The name of the one term that is a likelihood; None where there is none, or more than one."""
        found = [name for name, term in self.terms.items() if getattr(term, "likelihood", False)]
        return found[0] if len(found) == 1 else None

    def _term(self, name: str) -> Any:
        return self.terms[name]

    def _sum(self, losses: Logs, images_seen: int, like: torch.Tensor) -> tuple[torch.Tensor, Logs]:
        total = like.new_zeros(())
        logs: Logs = {}
        for name, loss in losses.items():
            weight = self.configs[name].weight_at(images_seen)
            # summed with its weight, logged without it
            total = total + weight * loss
            logs[f"loss/{name}"] = loss.detach()
            if self.configs[name].schedule is not None:
                logs[f"weight/{name}"] = loss.new_full((), weight)
            if hasattr(self.terms[name], "figures"):
                own: Logs = self._term(name).figures()
                logs |= {f"{name}/{figure}": value.detach() for figure, value in own.items()}
        return total, logs


@torch.no_grad()
def rate(moments: Moments, images: torch.Tensor) -> Logs:
    """Rate of the latent of images [B, C, H, W] and its active channels, from moments [B, c, h, w]; of clips [B, C, T,
    H, W] and sounds [B, C, L], each one image.

    An active unit is a channel whose posterior mean has a variance above 0.01 over images and positions; in one batch
    of a few images that is an estimate.
    """
    channels = moments.kl().flatten(2).sum(dim=2).mean(dim=0)  # [c] nats per image
    pixels = images[0, 0].numel()
    # the variance over the global batch: that of each rank's own would count other units as active
    # in fp64: fp32 gives a channel that always is 1,000 the variance of a live one
    rows = moments.mean.double().transpose(0, 1).flatten(1)
    mean, square = distributed.mean(torch.stack([rows.mean(dim=1), rows.square().mean(dim=1)]))
    active = square - mean.square() > ACTIVE
    return {
        "kl_nats_per_image": channels.sum(),
        "kl_nats_per_channel": channels,
        "bits_per_pixel": channels.sum() / pixels / math.log(2),
        "active_units": active.sum().to(channels.dtype),
    }
