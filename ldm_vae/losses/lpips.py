"""LPIPS, the perceptual term (Zhang et al., CVPR 2018); VGG is what latent-diffusion trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lpips
import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_vae.assets import load_lpips, random_lpips
from ldm_vae.errors import UsageError
from ldm_vae.losses import TermConfig

SMALLEST = {"vgg": 16, "alex": 31}  # pixels a side below which the trunk's pooling has nothing left


class LPIPS(nn.Module):
    """Mean LPIPS distance between pixels and target [B, C, H, W] in [-1, 1], C 1 or 3; fp32 also under autocast.

    The network is frozen, and no part of this module's state: checkpoints do not carry it.
    """

    domain = "pixels"
    network: Any

    def __init__(self, network: Any, smallest: int, chunk: int | None = None) -> None:
        super().__init__()
        self.__dict__["network"] = network  # past nn.Module's registry
        self.smallest = smallest
        self.chunk = chunk

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LPIPS:
        # the network follows to the device all the same, and stays in fp32 whatever the others become
        here = next(self.network.parameters()).device
        self.network.to(fn(torch.empty(0, device=here)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        channels, *sides = pixels.shape[1:]
        if channels not in (1, 3):
            raise UsageError(f"losses.lpips: expected images of 1 or 3 channels, got {channels}; use l1 or l2 alone")
        if min(sides) < self.smallest:
            raise UsageError(f"losses.lpips: expected crops of at least {self.smallest} px, got {min(sides)}")
        with torch.autocast(pixels.device.type, enabled=False):
            if self.chunk is None:
                return self._images(pixels, target).mean()
            chunks = zip(torch.split(pixels, self.chunk), torch.split(target, self.chunk), strict=True)
            return torch.cat([checkpoint(self._images, *chunk, use_reentrant=False) for chunk in chunks]).mean()

    def _images(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # the target's features need no graph: half of the activations
            wanted = self._features(target)
        return self._distance(self._features(pixels), wanted)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features of the five layers (Zhang et al. 2018, eq. 1)."""
        scaled = self.network.scaling_layer(images.float().expand(-1, 3, -1, -1))
        # where a ReLU left nothing the norm's gradient is NaN; the ReLU's backward pass puts 0 in its place
        return [lpips.normalize_tensor(layer) for layer in self.network.net(scaled)]

    def _distance(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
        distances = [
            linear((ours - theirs).square()).mean(dim=(1, 2, 3))
            for linear, ours, theirs in zip(self.network.lins, found, wanted, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


class Config(TermConfig):
    """LPIPS distance."""

    kind: Literal["lpips"] = "lpips"
    net: Literal["vgg", "alex"] = "vgg"
    """vgg for real training; alex is some 20 times cheaper, right for a demo on a CPU."""
    weights: str | None = None
    """A file of the trunk (torchvision's .pth, or safetensors); found by itself if null."""

    chunk: int | None = Field(None, gt=0)
    """Images whose activations are held at once; their forward is run again in the backward. For small GPUs: less
    memory for a third more LPIPS work, the same result."""

    def build(self) -> LPIPS:
        return LPIPS(load_lpips(self.net, self.weights), SMALLEST[self.net], self.chunk)

    def outline(self) -> LPIPS:
        return LPIPS(random_lpips(self.net), SMALLEST[self.net], self.chunk)
