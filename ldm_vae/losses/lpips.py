"""LPIPS, the perceptual term (Zhang et al., CVPR 2018); VGG is what latent-diffusion trains on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ldm_vae.losses import TermConfig
from ldm_vae.perceptual.lpips import LPIPS, SMALLEST
from ldm_vae.perceptual.pretrained import load_lpips, random_lpips


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
