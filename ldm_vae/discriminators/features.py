"""Discriminator on frozen features: small heads on hidden layers of a pretrained vision network.

As RAE's (Zheng et al. 2025), which is StyleGAN-T's (Sauer et al. 2023).

Legend: B batch, C image channels, H W pixels, D features, T positions (patches).
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm_vae.autoencoder.fingerprint import fingerprint
from ldm_vae.autoencoder.latents import at_least_fp32
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.core.frozen_module import Frozen
from ldm_vae.core.numbers import Count, Side
from ldm_vae.core.validation import first_line
from ldm_vae.discriminators import Discriminator
from ldm_vae.perceptual.vision import IMAGENET, Statistics, pixel_statistics, vision_network, vision_outline

NAME = "discriminator.backbone"


class Config(Part):
    """Discriminator on frozen features."""

    kind: Literal["features"] = "features"
    backbone: str = "facebook/dino-vits8"
    """A vision network of transformers (extra `transformers`): a folder or a hub id. RAE's is DINO ViT-S/8."""
    layers: tuple[Count, ...] = Field((3, 6, 9, 12), min_length=1)
    """Hidden layers with a head each; 0 is what the first layer is given."""
    kernel: int = Field(9, gt=0, lt=64)
    """Neighbouring positions that a head's middle convolution sees; odd."""
    resolution: Side = 224
    """Side in pixels that images are resized to for the network, bilinear and antialiased."""

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"expected an odd number, got {value}")
        return value

    def build(self, in_channels: int = 3) -> Features:
        return self._around(vision_network(NAME, self.backbone), in_channels, pixel_statistics(self.backbone))

    def outline(self, in_channels: int = 3) -> Features:
        return self._around(vision_outline(NAME, self.backbone, max(self.layers)), in_channels, None)

    def _around(self, backbone: Any, in_channels: int, statistics: Statistics | None) -> Features:
        if in_channels not in (1, 3):
            raise UsageError(f"discriminator: features takes 1 or 3 image channels, got {in_channels}; use patchgan")

        return Features(backbone, self, statistics)


class Features(Discriminator):
    """images [B, C, H, W] in [-1, 1] => logits [B, 1, 1, N], one per position of each chosen layer.

    The frozen network is in no state dict; its fingerprint is, so that a run does not go on with another one.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Any, config: Config, statistics: Statistics | None) -> None:
        """statistics: of the pixels that the backbone takes; None for an outline."""
        super().__init__()
        self.backbone = Frozen(backbone)
        self.source, self.layers, self.side = config.backbone, config.layers, (side := config.resolution)
        for name, values in zip(("mean", "std"), statistics or IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        # what decides the features: of a network without content there is none
        decides = {**backbone.state_dict(), "mean": self.mean, "std": self.std}
        self.identity = "" if statistics is None else fingerprint(decides)
        # of networks with one; that of others (a hierarchy of resolutions) is no square of tokens behind a class token
        patch = getattr(backbone.config, "patch_size", side)
        self.patch = int(patch if isinstance(patch, int) else max(patch))
        if side < self.patch:
            raise UsageError(f"discriminator.resolution: {self.source} has patches of {self.patch} px, got {side} px")

        # positions are encoded for one size; a network of another needs to be told that it may resize them
        takes = inspect.signature(backbone.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        with torch.no_grad():
            found = self._hidden(torch.zeros(1, 3, side, side))
        self.heads = nn.ModuleList(_Head(one.shape[1], config.kernel) for one in found)
        self.train()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self._hidden(images)
        logits = torch.cat([head(one) for head, one in zip(self.heads, hidden, strict=True)], dim=1)
        return at_least_fp32(logits)[:, None, None]

    def _hidden(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The chosen hidden layers, [B, D, T] each."""
        network = self.backbone.network
        x = images.to(next(network.parameters()).dtype).expand(-1, 3, -1, -1)
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        x = (x * 0.5 + 0.5 - self.mean) / self.std
        try:
            states = network(pixel_values=x, output_hidden_states=True, **self.options).hidden_states
        except ValueError as error:  # a size that it does not take
            raise UsageError(f"discriminator.resolution {self.side}: {self.source}: {first_line(error)}") from error
        if max(self.layers) >= len(states):
            raise UsageError(
                f"discriminator.layers: {self.source} has hidden layers 0 to {len(states) - 1}, got {max(self.layers)}"
            )
        return [self._positions(states[layer]) for layer in self.layers]

    def _positions(self, state: torch.Tensor) -> torch.Tensor:
        if state.ndim == 4:
            return state.flatten(2)
        # a class token and registers stand in front of the patches
        before = max(0, state.shape[1] - (self.side // self.patch) ** 2)
        return state[:, before:].transpose(1, 2)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([*bytes.fromhex(self.identity)], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise UsageError(f"{NAME}: {self.source} is not the network that this run began with: its weights differ")


class _Head(nn.Module):
    """[B, D, T] => logits [B, T]. As published, but for the norm: of groups of channels of one image instead of a batch
    norm, so that a logit does not depend on the micro-batch."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.first, self.second = _block(width, 1), _block(width, kernel)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        logits: torch.Tensor = self.last((x + self.second(x)) / math.sqrt(2.0))
        return logits.flatten(1)


def _block(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding="same", padding_mode="circular")
    norm = nn.GroupNorm(math.gcd(32, max(1, width // 4)), width)
    return nn.Sequential(spectral_norm(convolution), norm, nn.LeakyReLU(0.2))
