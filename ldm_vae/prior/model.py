"""Prior over codes: what training, measuring and sampling ask of one of `ldm_vae/priors`.

Legend: B batch, q codebooks, p positions (h w, or t h w), n their number, K codes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_vae.prior.sampling import SamplingConfig


class Prior(nn.Module, ABC):
    """Distribution of indices [B, q, *p] under labels [B]. `network` is the trained part, of diffusers' ModelMixin.

    `forward` is the one of training. It goes through `accelerator.prepare`, so that DDP's hooks fire.
    """

    is_exact: bool
    """`nats` is the negative log-likelihood; else an unbiased estimate of an upper bound of one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, positions: Sequence[int]) -> torch.Tensor:
        """Loss to train by, in nats per index, a mean over images; draws are keyed by the images' positions in the
        global stream."""

    @abstractmethod
    def nats(self, indices: torch.Tensor, labels: torch.Tensor, seed: int, keys: Sequence[int]) -> torch.Tensor:
        """-log p of each image [B], of all its indices together; draws of an estimate are keyed."""

    @abstractmethod
    def sample(self, labels: torch.Tensor, seed: int, keys: Sequence[int], sampling: SamplingConfig) -> torch.Tensor:
        """Indices [B, q, *p], one image for each key. The same key gives the same image in any batch, but for a draw
        within rounding of the border between two codes."""

    def around(self, network: Any) -> Prior:
        """The same around another network of this shape, such as the averaged weights; in eval mode."""
        twin = copy.copy(self)
        twin._modules = self._modules | {"network": network}
        return twin.eval()

    def save(self, folder: Path) -> None:
        """Write what diffusers' `from_pretrained` reads."""
        self.network.save_pretrained(folder)
