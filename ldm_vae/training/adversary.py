"""Adversary: the losses of both sides, the images from which each of them plays, and regularisers of the discriminator.

Two methods, not a mode flag. `generator_loss` is what the autoencoder minimises, `discriminator_loss` what the
discriminator does. Legend: B batch, C image channels, T frames, H W pixels, T' H' W' patches; logits are [B, 1, H',
W'], of a discriminator of clips [B, 1, T', H', W'], of one with several heads a list of each head's; their losses are
averaged over the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core import distributed
from ldm_vae.core.config import Section
from ldm_vae.core.micro_batches import Pending
from ldm_vae.core.numbers import Count
from ldm_vae.discriminators import Logits, heads_of, per_head


class AdversaryConfig(Section):
    """The adversarial term."""

    weight: float = 0.5
    """Factor of the generator loss; with `adaptive`, relative to the pixel terms' gradient (0: no adversary)."""
    adaptive: bool = True
    """Balance the gradients of pixel terms and adversary at the last layer (Esser et al. 2021, eq. 7). A fixed weight
    is on the scale of per-pixel means: latent-diffusion's divided by C * H * W."""
    loss: Literal["hinge", "vanilla", "non_saturating", "least_squares"] = "hinge"
    """Hinge (Lim & Ye 2017), vanilla (Goodfellow et al. 2014, with the linear generator loss of latent-diffusion),
    non-saturating, or least squares (Mao et al. 2017, with labels 1 and 0, as audio codecs have it)."""
    feature_matching: float = Field(0.0, ge=0)
    """Factor, beside the generator loss, of the mean absolute difference of the discriminator's feature maps of
    reconstruction and original (Larsen et al. 2016; Kumar et al. 2023); 0: none. For discriminator.kind waveform."""
    start_images: Count = 0
    """Images seen before the autoencoder is trained against the discriminator."""
    warmup_images: Count = 0
    """Images before start_images in which the discriminator already learns, unseen by the autoencoder."""
    r1_weight: float = Field(0.0, ge=0)
    """gamma of R1, the discriminator's squared gradient on real images (Mescheder et al. 2018, eq. 9); 0: none."""
    r1_every: int = Field(16, gt=0)
    """R1 in one of so many updates, over its whole batch and times as much (lazy regularisation, Karras et al. 2020,
    section 3.1)."""
    lecam_weight: float = Field(0.0, ge=0)
    """lambda of LeCAM, which holds real logits near the average of the fake ones and the reverse: for small data (Tseng
    et al. 2021, eq. 4); 0: none."""
    lecam_halflife_images: int = Field(20_000, gt=0)
    """Half-life of those averages, which move once per update; the paper's decay of 0.999 at batch 32 is 22,000."""

    @property
    def enabled(self) -> bool:
        return self.weight > 0


class Adversary(nn.Module):
    """Adversarial losses and regularisers. Its state, in the checkpoint: LeCAM's averages of the real and of the fake
    logits."""

    averages: torch.Tensor
    updates: torch.Tensor

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = Pending()
        self.images = 0  # of the update under way, over all processes
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def boundary(self) -> float:
        """The logit on whose upper side a discriminator says real: halfway between the labels of least squares."""
        return 0.5 if self.config.loss == "least_squares" else 0.0

    def generator_plays(self, images_seen: int) -> bool:
        return self.config.enabled and images_seen >= self.config.start_images

    def discriminator_plays(self, images_seen: int) -> bool:
        return self.config.enabled and images_seen >= self.config.start_images - self.config.warmup_images

    def generator_loss(self, fake_logits: Logits) -> torch.Tensor:
        """Loss of the autoencoder, from the logits of its reconstructions."""
        if self.config.loss == "non_saturating":
            return per_head(lambda fake: F.softplus(-fake).mean(), fake_logits)
        if self.config.loss == "least_squares":
            return per_head(lambda fake: (1.0 - fake).square().mean(), fake_logits)
        return per_head(lambda fake: -fake.mean(), fake_logits)

    def feature_matching(self, real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
        """Factor times the mean over feature maps of their mean absolute difference; `real` ends its graph here."""
        distances = [(one.detach() - other).abs().mean() for one, other in zip(real, fake, strict=True)]
        return self.config.feature_matching * torch.stack(distances).mean()

    def discriminator_loss(self, real_logits: Logits, fake_logits: Logits) -> torch.Tensor:
        """Loss of the discriminator; 1.0 (hinge), ln 2, or 0.25 (least squares) means that it knows nothing."""

        def of_head(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
            if self.config.loss == "hinge":
                return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
            if self.config.loss == "least_squares":
                return 0.5 * ((1.0 - real).square().mean() + fake.square().mean())
            return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

        return per_head(of_head, real_logits, fake_logits)

    # --- regularisers of the discriminator ----------------------------------------------------------------------------

    def r1_due(self, images_seen: int, global_batch: int) -> bool:
        """Tell whether this update, of so many images over all processes and micro-batches, pays R1: all or nothing."""
        return self.config.r1_weight > 0 and images_seen // global_batch % self.config.r1_every == 0

    def r1(self, real: torch.Tensor, real_logits: Logits) -> torch.Tensor:
        """gamma / 2 * E |grad_x D(x)|^2 times r1_every; D(x) is the mean logit, over its heads too, of an image [B, C,
        H, W], a clip [B, C, T, H, W] or a sound [B, C, L], what the discriminator sees; real requires a gradient."""
        # the sum of the logits, divided afterwards in fp32: the cotangent of a mean is subnormal in fp16
        heads = heads_of(real_logits)
        most = max(head[0].numel() for head in heads)
        total = torch.stack([head.sum() * (most / head[0].numel()) for head in heads]).sum()
        (gradient,) = torch.autograd.grad(total, real, create_graph=True)
        gradient = at_least_fp32(gradient) / (most * len(heads))
        squared = gradient.square().flatten(1).sum(dim=1).mean()
        return 0.5 * self.config.r1_weight * self.config.r1_every * squared

    def lecam(self, real_logits: Logits, fake_logits: Logits, images: int) -> torch.Tensor:
        """lambda * (E relu(D(x) - fake average)^2 + E relu(real average - D(G))^2) of a micro-batch of so many images
        or clips, with the averages of the updates before it; 0 in the first update, which has none."""
        means = [per_head(lambda head: head.detach().mean(), one) for one in (real_logits, fake_logits)]
        self.logits.add(torch.stack(means))
        self.images += images * distributed.world_size()
        real_average, fake_average = self.averages.unbind()
        distance = per_head(lambda real: F.relu(real - fake_average).square().mean(), real_logits)
        distance = distance + per_head(lambda fake: F.relu(real_average - fake).square().mean(), fake_logits)
        return torch.where(self.updates > 0, self.config.lecam_weight * distance, 0.0)

    @torch.no_grad()
    def after_update(self) -> None:
        """Move LeCAM's averages by all micro-batches and ranks of an update that was taken."""
        if not self.images:
            return
        self.updates += 1
        keep = 0.5 ** (self.images / self.config.lecam_halflife_images)
        # bias-corrected as Adam's moments: the first average is the first update's, not a thousandth of it
        self.averages.lerp_(self.logits.mean().to(self.averages), (1.0 - keep) / (1.0 - keep**self.updates))
        self.images = 0

    def leave_out(self) -> None:
        """Forget an update that was not taken."""
        self.logits.clear()
        self.images = 0
