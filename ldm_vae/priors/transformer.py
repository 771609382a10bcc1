"""A causal transformer: each index from all earlier ones of its order, so the likelihood of an image is exact.

    p(indices | label) = product over steps of p(indices of the step | earlier steps, label)

Pre-norm blocks of GPT-2 (Radford et al. 2019) with learned positions, as in taming-transformers (Esser et al., CVPR
2021); the label's embedding is added at every step.

Legend: B batch, q codebooks, p positions (n of them), K codes, S steps, w indices a step (`prior/order.py`), H heads,
D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core import rng
from ldm_vae.core.config import Part
from ldm_vae.prior.model import Prior
from ldm_vae.prior.order import OrderName, from_steps, table, to_steps
from ldm_vae.prior.sampling import SamplingConfig, draw, restrict


class Block(nn.Module):
    """Attention to this step and the ones before, then a perceptron, each added to its input [B, S, H D]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, step: int = 0) -> torch.Tensor:
        """x: of all steps, or with a cache [2, B, H, S, D] of keys and values that of `step` alone, [B, 1, H D]."""
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, step], cache[1, :, :, step] = k[:, :, 0], v[:, :, 0]
            k, v = cache[:, :, :, : step + 1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x))))
        return y


class CausalTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' classes are untyped
    """Logits of every index of a step from the steps before it."""

    _supports_gradient_checkpointing = True
    places: torch.Tensor
    offsets: torch.Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        codes: int,
        codebooks: int,
        positions: int,
        classes: int,
        order: OrderName = "raster",
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        width, places = num_attention_heads * attention_head_dim, table(order, codebooks, positions)
        steps, self.per_step = places.shape
        # the codebook of each place: in delay order that of its column, also where a step holds none
        book = torch.arange(codebooks).expand_as(places) if order == "delay" else places // positions
        self.register_buffer("places", places, persistent=False)
        # each codebook has its own rows in the table of embeddings, the last of which is that of no index
        self.register_buffer("offsets", book * (codes + 1), persistent=False)
        self.tokens = nn.Embedding(codebooks * (codes + 1), width)
        self.steps = nn.Embedding(steps, width)
        self.labels = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(num_attention_heads, attention_head_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.per_step * codes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # outputs of blocks are summed: 2 a layer
                shared = 2 * num_layers if name.endswith(("attention_out.weight", "mlp_out.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(shared))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.head.weight)  # it begins with all codes alike, at log2 K bits

    def forward(self, steps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """steps [B, S, w] of indices (K: none), labels [B] => logits [B, S, w, K] of each from the steps before."""
        before = self.tokens(steps + self.offsets).sum(dim=2)
        x = F.pad(before[:, :-1], (0, 0, 1, 0)) + self.steps.weight + self.labels(labels)[:, None]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return at_least_fp32(self.head(self.norm(x)).unflatten(-1, (self.per_step, -1)))


class Walk:
    """The steps of a batch one by one, each in the time of one: keys and values of earlier ones are kept."""

    def __init__(self, network: CausalTransformer, labels: torch.Tensor) -> None:
        """labels: [B]."""
        self.network, self.step = network, 0
        self._label = network.labels(labels)  # [B, H D]
        block = network.blocks[0]
        shape = (len(network.blocks), 2, len(labels), block.heads, len(network.places),
                 self._label.shape[1] // block.heads)  # fmt: skip
        self._cache = self._label.new_empty(shape)

    @torch.no_grad()
    def next(self, before: torch.Tensor | None) -> torch.Tensor:
        """Indices [B, w] of the step before (None at the first; K: none) => logits [B, w, K] of the step."""
        network, step = self.network, self.step
        x = self._label + network.steps.weight[step]
        if before is not None:
            x = x + network.tokens(before + network.offsets[step - 1]).sum(dim=1)
        x = x[:, None]
        for block, cache in zip(network.blocks, self._cache, strict=True):
            x = block(x, cache, step)
        self.step += 1
        return network._logits(x)[:, 0]


class Causal(Prior):
    """A causal transformer and its order."""

    is_exact = True

    def __init__(self, network: CausalTransformer, shape: Sequence[int]) -> None:
        super().__init__(network)
        self.shape = tuple(shape)
        self.blank = int(network.config.codes)

    def _nats(self, indices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, S, w], 0 where a step holds no index."""
        steps = to_steps(indices.flatten(1), self.network.places, self.blank)
        logits = self.network(steps, labels)
        nats = F.cross_entropy(logits.movedim(-1, 1), steps.clamp(max=self.blank - 1), reduction="none")
        real: torch.Tensor = self.network.places >= 0
        return nats * real

    def forward(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, positions: Sequence[int]) -> torch.Tensor:
        return self._nats(indices, labels).sum() / indices.numel()

    def nats(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, keys: Sequence[int]) -> torch.Tensor:
        return self._nats(indices, labels).double().flatten(1).sum(dim=1)

    def sample(self, labels: torch.Tensor, seed: int, keys: Sequence[int], sampling: SamplingConfig) -> torch.Tensor:
        places = self.network.places
        draws = [torch.from_numpy(rng.generator(seed, "codes", key).random(places.shape)) for key in keys]
        uniform = torch.stack(draws).to(labels.device)  # [B, S, w]
        walk, before, steps = Walk(self.network, labels), None, []
        for step, real in enumerate(places >= 0):
            drawn = draw(restrict(walk.next(before), sampling), uniform[:, step])
            before = drawn.masked_fill(~real, self.blank)
            steps.append(before)
        return from_steps(torch.stack(steps, dim=1), places).view(-1, *self.shape)


class Config(Part):
    """Shape of a causal transformer, in diffusers' names."""

    kind: Literal["transformer"] = "transformer"
    order: OrderName = "raster"
    """Order of prediction. delay: of several codebooks all indices of a position in one step, each book a step later
    than the one before it; fewer steps, but what is in one step is independent."""
    num_layers: int = Field(12, gt=0, le=256)
    """Blocks."""
    num_attention_heads: int = Field(12, gt=0, le=256)
    """Heads of a block."""
    attention_head_dim: int = Field(64, gt=0, le=1024)
    """Width of a head; width of the network = heads times this."""

    def build(self, codes: int, shape: Sequence[int], classes: int) -> Causal:
        """A network for indices [*shape] = [q, *p] of so many codes."""
        books, *positions = shape
        options: dict[str, Any] = self.model_dump(exclude={"kind"})
        return Causal(CausalTransformer(codes, books, math.prod(positions), classes, **options), shape)
