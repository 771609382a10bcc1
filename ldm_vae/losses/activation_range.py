"""Keep activations away from the end of fp16 (65,504): train a VAE that runs in half precision without an upcast.

SDXL's VAE is the known case: its residual stream outgrows fp16. The term watches the output of every residual block and
of every attention; the penalty comes long before the overflow.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.losses import TermConfig

WATCHED = (ResnetBlock2D, Attention, AutoencoderTinyBlock)


class ActivationRange(nn.Module):
    """mean over the watched layers of mean relu(|activation| / limit - 1)^2; 0 while all are within the limit."""

    domain = "latents"

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.largest = torch.zeros(())
        self._excess: list[torch.Tensor] = []
        self._sizes: list[torch.Tensor] = []

    def attach(self, network: TrainableAutoencoder) -> None:
        """Raises UsageError with gradient checkpointing, which gives a hook activations without a graph."""
        if getattr(network.vae, "is_gradient_checkpointing", False):
            raise UsageError("losses.activation_range: expected gradient_checkpointing false, got true")
        for module in network.vae.modules():
            if isinstance(module, WATCHED):
                module.register_forward_hook(self._watch)

    def _watch(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            size = output.float().abs()
            self._excess.append(F.relu(size / self.limit - 1.0).square().mean())
            self._sizes.append(size.detach().amax())

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        if not self._excess:
            raise UsageError("losses.activation_range: the network has no residual block to watch")
        excess, self.largest = torch.stack(self._excess).mean(), torch.stack(self._sizes).amax()
        self._excess, self._sizes = [], []
        return excess

    def figures(self) -> dict[str, torch.Tensor]:
        return {"largest": self.largest}


class Config(TermConfig):
    """Activations beyond a limit."""

    kind: Literal["activation_range"] = "activation_range"
    weight: float = 1e-3
    """Small: within the limit it is 0 anyway."""
    limit: float = Field(8192.0, gt=0)
    """An eighth of fp16's largest number: images that were never trained on go further."""

    def build(self) -> ActivationRange:
        return ActivationRange(self.limit)
