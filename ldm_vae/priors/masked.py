"""diffusers.UVit2DModel: indices that are masked from all that are not, sampled in a few rounds by AmusedScheduler
(Chang et al., "MaskGIT", CVPR 2022; Patil et al., "aMUSEd", 2024).

It has no likelihood of its own. What is measured bounds that of another sampler, which unmasks one index after the
other in an order drawn uniformly (Uria et al., ICML 2014; Hoogeboom et al., ICLR 2022):

    -log p(indices)  <=  E_order[sum over i of -log p(i | those before it)]
                      =  E_m E_mask of m[n / m * sum over masked i of -log p(i | not masked)],  m uniform in 1..n

AmusedScheduler unmasks several at a time and the likely ones first: its samples have no such bound.

Legend: B batch, p positions (n of them) as h w (of clips t * h, w), K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, UVit2DModel
from pydantic import Field, model_validator

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core import rng
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.prior.model import Prior
from ldm_vae.prior.sampling import SamplingConfig, restrict

MICRO = 2  # width of the embedding of aMUSEd's micro-conditions, which are 0 here


class Masked(Prior):
    """The network with its mask; a label enters one-hot, so that the projection of aMUSEd's text is its embedding."""

    is_exact = False

    def __init__(self, network: UVit2DModel, shape: Sequence[int], classes: int) -> None:
        super().__init__(network)
        self.shape, self.classes = tuple(shape), classes
        self.mask = int(network.config.codebook_size)  # the index that stands for a masked one
        self.scheduler = AmusedScheduler(mask_token_id=self.mask)

    def _logits(self, indices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """indices [B, q, *p] with masked ones, labels [B] => logits [B, K, n]."""
        label = F.one_hot(labels, self.classes + 1).to(self.network.dtype)
        flat = indices.reshape(len(indices), -1, self.shape[-1])
        logits = self.network(flat, label[:, None], label, label.new_zeros(len(label), 1))
        return at_least_fp32(logits.flatten(2))

    def masked_nats(self, indices: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Sum of -log p of the masked indices [B], given the others; masked [B, n] is true for them."""
        flat = indices.flatten(1)
        hidden = flat.masked_fill(masked, self.mask).view_as(indices)
        nats = F.cross_entropy(self._logits(hidden, labels), flat, reduction="none")
        return (nats * masked).sum(dim=1)

    def forward(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, positions: Sequence[int]) -> torch.Tensor:
        count = indices[0].numel()
        draws = [rng.generator(seed, "mask", place) for place in positions]
        # MaskGIT's cosine schedule, as the scheduler unmasks: most images are mostly masked
        counts = [max(1, math.floor(count * math.cos(math.pi / 2 * draw.random()))) for draw in draws]
        masked = _masks(draws, counts, count, indices.device)
        return (self.masked_nats(indices, labels, masked) / masked.sum(dim=1)).mean()

    def nats(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, keys: Sequence[int]) -> torch.Tensor:
        """An unbiased estimate of the bound, of one mask an image."""
        count = indices[0].numel()
        draws = [rng.generator(seed, "bound", key) for key in keys]
        counts = [int(draw.integers(1, count + 1)) for draw in draws]
        masked = _masks(draws, counts, count, indices.device)
        return self.masked_nats(indices, labels, masked).double() * count / masked.sum(dim=1)

    @torch.no_grad()
    def sample(self, labels: torch.Tensor, seed: int, keys: Sequence[int], sampling: SamplingConfig) -> torch.Tensor:
        self.scheduler.set_timesteps(sampling.steps, device=labels.device)
        # a generator for each image, and a step of the scheduler for each: one for all would make a batch's images
        # depend on each other
        draws = [int(rng.generator(seed, "codes", key).integers(2**63)) for key in keys]
        generators = [torch.Generator(labels.device).manual_seed(draw) for draw in draws]
        indices = torch.full((len(labels), *self.shape), self.mask, device=labels.device)
        for time in self.scheduler.timesteps:
            logits = restrict(self._logits(indices, labels).mT, sampling)  # [B, n, K]
            rows = [
                self.scheduler.step(logits[row : row + 1], time, indices[row].view(1, -1), generator=own).prev_sample
                for row, own in enumerate(generators)
            ]
            indices = torch.cat(rows).view_as(indices)
        return indices

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.scheduler.save_pretrained(folder)


def _masks(draws: Sequence[np.random.Generator], counts: Sequence[int], of: int, device: torch.device) -> torch.Tensor:
    """[B, of], true at so many places of each."""
    rows = [np.isin(np.arange(of), draw.permutation(of)[:count]) for draw, count in zip(draws, counts, strict=True)]
    return torch.tensor(np.stack(rows), device=device)


class Config(Part):
    """Shape of aMUSEd's network, in diffusers' names."""

    kind: Literal["masked"] = "masked"
    hidden_size: int = Field(768, gt=0, le=2**14)
    """Width of the network; a multiple of the heads."""
    num_hidden_layers: int = Field(12, gt=0, le=256)
    """Transformer blocks."""
    num_attention_heads: int = Field(12, gt=0, le=256)
    """Heads of a block."""
    num_res_blocks: int = Field(3, gt=0, le=64)
    """Blocks of a convolution and attention before the transformer's, and as many behind."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads {self.num_attention_heads}, got "
                f"{self.hidden_size}"
            )
        return self

    def build(self, codes: int, shape: Sequence[int], classes: int) -> Masked:
        """A network for indices [1, *p] of so many codes.

        Raises:
            UsageError: there are several codebooks.
        """
        if shape[0] != 1:
            raise UsageError(
                f"model.kind: masked is for one codebook, the store's codes have {shape[0]}; kind transformer takes "
                "them"
            )
        width: dict[str, Any] = {"hidden_size": self.hidden_size, "in_channels": self.hidden_size}
        network = UVit2DModel(
            **width,
            block_out_channels=self.hidden_size,
            block_num_heads=self.num_attention_heads,
            num_attention_heads=self.num_attention_heads,
            num_hidden_layers=self.num_hidden_layers,
            num_res_blocks=self.num_res_blocks,
            intermediate_size=self.hidden_size * 11 // 4,  # aMUSEd's 2816 of 1024
            cond_embed_dim=classes + 1,
            encoder_hidden_size=classes + 1,
            micro_cond_encode_dim=MICRO,
            micro_cond_embed_dim=MICRO,
            codebook_size=codes,
            vocab_size=codes + 1,
            sample_size=shape[-1],
        )
        return Masked(network, shape, classes)
