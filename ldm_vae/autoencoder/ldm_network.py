"""latent-diffusion's encoder and decoder as functions of a dict of tensors in LDM's names.

This is how ComfyUI and A1111 read a file: their network *is* this one, and looks its tensors up by these names. An
exported single file is run through it and compared with the model that was exported, so that a wrong name, shape or
order is found here and not there. Nothing trains or infers with it.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

Tensors = Mapping[str, torch.Tensor]


class LdmNetwork:
    """LDM's network over `tensors` without prefix; `groups` of every GroupNorm (32 in every program that reads such
    files)."""

    def __init__(self, tensors: Tensors, groups: int = 32) -> None:
        self.tensors = {name: value.float() for name, value in tensors.items()}
        self.groups = groups
        self.levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down."))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, C, H, W] => moments [B, 2c, h, w]."""
        x = self._conv("encoder.conv_in", pixels, padding=1)
        for level in range(self.levels):
            x = self._blocks(f"encoder.down.{level}", x)
            if f"encoder.down.{level}.downsample.conv.weight" in self.tensors:
                padded = functional.pad(x, (0, 1, 0, 1))
                x = self._conv(f"encoder.down.{level}.downsample.conv", padded, stride=2)
        return self._conv_if_there("quant_conv", self._end("encoder", self._middle("encoder", x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """unscaled z [B, c, h, w] => pixels [B, C, H, W]."""
        x = self._conv("decoder.conv_in", self._conv_if_there("post_quant_conv", z), padding=1)
        x = self._middle("decoder", x)
        for level in reversed(range(self.levels)):
            x = self._blocks(f"decoder.up.{level}", x)
            if f"decoder.up.{level}.upsample.conv.weight" in self.tensors:
                larger = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self._conv(f"decoder.up.{level}.upsample.conv", larger, padding=1)
        return self._end("decoder", x)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _middle(self, side: str, x: torch.Tensor) -> torch.Tensor:
        x = self._attention(f"{side}.mid.attn_1", self._block(f"{side}.mid.block_1", x))
        return self._block(f"{side}.mid.block_2", x)

    def _blocks(self, place: str, x: torch.Tensor) -> torch.Tensor:
        index = 0
        while f"{place}.block.{index}.conv1.weight" in self.tensors:
            x = self._attention(f"{place}.attn.{index}", self._block(f"{place}.block.{index}", x))
            index += 1
        return x

    def _block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self._conv(f"{name}.conv1", self._norm_silu(f"{name}.norm1", x), padding=1)
        h = self._conv(f"{name}.conv2", self._norm_silu(f"{name}.norm2", h), padding=1)
        return self._conv_if_there(f"{name}.nin_shortcut", x) + h

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.q.weight" not in self.tensors:
            return x
        normal = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", normal).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
        mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self._conv(f"{name}.proj_out", mixed)

    def _end(self, side: str, x: torch.Tensor) -> torch.Tensor:
        return self._conv(f"{side}.conv_out", self._norm_silu(f"{side}.norm_out", x), padding=1)

    def _norm_silu(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(self._norm(name, x))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return functional.group_norm(x, self.groups, weight, bias, eps=1e-6)

    def _conv(self, name: str, x: torch.Tensor, *, stride: int = 1, padding: int = 0) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return functional.conv2d(x, weight, bias, stride, padding)

    def _conv_if_there(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._conv(name, x) if f"{name}.weight" in self.tensors else x
