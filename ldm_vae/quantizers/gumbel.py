"""The discrete VAE of DALL-E (Ramesh et al., ICML 2021): codes are drawn by Gumbel-softmax (Jang et al., ICLR 2017).

The logits are negative squared distances to the codebook's rows, so the most probable code is the nearest row: at the
end of the annealing the network is a VQModel, with equal indices.

Legend: B batch, c channels of a code, p latent positions (n of them), K codes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, Encoded
from ldm_vae.core.config import Part
from ldm_vae.core.micro_batches import Pending
from ldm_vae.quantizers import usage


class GumbelSoftmax(Bottleneck):
    """z = softmax((logits + Gumbel noise) / temperature) @ codebook; the codebook learns by gradient."""

    gives = "codes"
    noise_channels = 1  # it seeds one generator per image: K maps of noise of each image would not pass a CPU in time

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pending = Pending()
        self.temperature = config.temperature

    def encode(self, vae: Any, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Encoded:
        moments = latents.encode(vae, images)
        book = vae.quantize.embedding.weight
        with torch.autocast(images.device.type, enabled=False):
            rows = moments.mean.flatten(2).mT  # [B, n, c]
            # |r|^2 is the same for all codes of a position and would only cost precision
            logits = 2 * rows @ book.T - book.square().sum(dim=1)  # [B, n, K]
            self.temperature = self.config.temperature_at(images_seen)
            weights = F.softmax((logits + gumbel(noise, logits)) / self.temperature, dim=2)
            if self.config.hard:
                hard = torch.zeros_like(weights).scatter_(2, weights.argmax(dim=2, keepdim=True), 1.0)
                weights = hard + weights - weights.detach()
            z = weights @ book
            log_q = F.log_softmax(logits, dim=2)
            kl = (log_q.exp() * log_q).sum(dim=2) + math.log(len(book))  # against the uniform prior
        indices = logits.detach().argmax(dim=2)
        ones = torch.ones_like(indices.flatten(), dtype=book.dtype)
        if self.training:  # with a frozen encoder too
            self.pending.add(ones.new_zeros(len(book)).index_add_(0, indices.flatten(), ones))
        shape = (len(images), *moments.mean.shape[2:])
        z, after = (part.mT.unflatten(2, shape[1:]) for part in (z, F.embedding(indices, book)))
        codes = Codes(indices.view(shape), moments.mean, after, kl.view(shape))
        return Encoded(moments, z, codes)

    def decode(self, vae: Any, z: torch.Tensor) -> torch.Tensor:
        return latents.pixels_of(vae, z, force_not_quantize=True)

    def after_update(self, vae: Any) -> dict[str, torch.Tensor]:
        counts = self.pending.total()
        return usage(counts) | {"codes/temperature": counts.new_tensor(self.temperature)}

    def leave_out(self) -> None:
        self.pending.clear()


def gumbel(noise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of the shape of `like` [B, ...], drawn on its device by hashing counters, each image's with the bits
    of its own keyed noise [B, 1, *p]: the same on every device, for any division over ranks and after a resume."""
    seeds = _mix(noise[:, 0].flatten(1)[:, 0].float().contiguous().view(torch.int32).long())
    counters = _mix(torch.arange(like[0].numel(), device=like.device))
    rows = []
    for seed in seeds:  # one image at a time: the hash is in 64-bit integers
        uniform = ((_mix((counters + seed) & 0xFFFFFFFF) >> 8).to(like.dtype) + 0.5) / 2**24
        rows.append(-torch.log(-torch.log(uniform)).view(like.shape[1:]))
    return torch.stack(rows)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers, held in int64, whose output bits look random (Wellons' lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Config(Part):
    """Codes drawn by Gumbel-softmax, the temperature falling."""

    kind: Literal["gumbel"] = "gumbel"
    temperature: float = Field(1.0, gt=0)
    """To start from."""
    final_temperature: float = Field(1 / 16, gt=0)
    """At the end: near 0 the weights are all on one code, as they are at inference."""
    anneal_images: int = Field(1_000_000, gt=0)
    """Images in which it falls, along a half cosine."""
    hard: bool = False
    """Decode one code, with the gradient of the soft weights (straight-through Gumbel)."""

    def temperature_at(self, images_seen: int) -> float:
        """The temperature after so many images."""
        progress = min(1.0, images_seen / self.anneal_images)
        return self.final_temperature + (self.temperature - self.final_temperature) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )

    def build(self, vae: Any) -> GumbelSoftmax:
        return GumbelSoftmax(self)
