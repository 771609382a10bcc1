"""LPIPS (Zhang et al., CVPR 2018) with a gradient, in chunks where memory is short, and as a map."""

from __future__ import annotations

from typing import Any

import lpips
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ldm_vae.core.errors import UsageError
from ldm_vae.core.frozen_module import Frozen

SMALLEST = {"vgg": 16, "alex": 31}  # pixels a side below which the trunk's pooling has nothing left


class LPIPS(Frozen):
    """Mean LPIPS distance between pixels and target [B, C, H, W] in [-1, 1], C 1 or 3; fp32 also under autocast."""

    domain = "pixels"

    def __init__(self, network: Any, smallest: int, chunk: int | None = None) -> None:
        super().__init__(network)
        self.smallest = smallest
        self.chunk = chunk

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
        layers = self._layers(self._features(pixels), wanted)
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in layers]).sum(dim=0)

    @torch.no_grad()
    def spatial_map(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Map of the distance [B, 1, H, W]: each layer's map resized to the image; its mean is about LPIPS."""
        layers = self._layers(self._features(pixels), self._features(target))
        size = pixels.shape[2:]
        maps = [F.interpolate(layer, size, mode="bilinear", align_corners=False) for layer in layers]
        return torch.stack(maps).sum(dim=0)

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features of the five layers (Zhang et al. 2018, eq. 1)."""
        scaled = self.network.scaling_layer(images.float().expand(-1, 3, -1, -1))
        # where a ReLU left nothing the norm's gradient is NaN; the ReLU's backward pass puts 0 in its place
        return [lpips.normalize_tensor(layer) for layer in self.network.net(scaled)]

    def _layers(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[torch.Tensor]:
        """Weighted squared differences per layer, [B, 1, h, w] each."""
        return [
            linear((ours - theirs).square())
            for linear, ours, theirs in zip(self.network.lins, found, wanted, strict=True)
        ]
