"""Adaptive weight: the factor on the adversary's gradient beside that of the pixel terms (Esser et al. 2021, eq. 7).

The textbook form takes two `autograd.grad(..., retain_graph=True)`, which keep the graphs of LPIPS and discriminator
alive. With the graph cut at the reconstruction, both gradients of the last convolution follow from the two cotangents
by one convolution each.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.grad import conv2d_weight

EPSILON = 1e-4  # taming-transformers', added to |g_adv|
LARGEST = 1e4  # taming-transformers' clamp of the ratio on the scale of sums; ours is per pixel value, hence / (C*H*W)


def last_layer_gradient(layer: nn.Conv2d, hidden: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    """Gradient of `layer.weight` when its output [B, C, H, W] has this cotangent; hidden is the layer's input, fp32."""
    # a mean-L1 cotangent at 256 px is 1 / (B * 196,608): subnormal in fp16, so the convolution sees it divided by its
    # own maximum
    largest = cotangent.abs().amax().clamp_min(torch.finfo(cotangent.dtype).tiny)
    gradient: torch.Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        hidden.to(cotangent.dtype), list(layer.weight.shape), cotangent / largest, layer.stride, layer.padding
    )
    return gradient * largest


def adaptive_ratio(
    accelerator: Accelerator,
    layer: nn.Conv2d,
    hidden: torch.Tensor,
    pixel_cotangent: torch.Tensor,
    adversary_cotangent: torch.Tensor,
) -> torch.Tensor:
    """|g_rec| / (|g_adv| + 1e-4), clamped, a scalar: the same on every rank and for every split of the batch.

    The two gradients are averaged over the ranks before their norms are taken, in one collective.
    """
    gradients = torch.stack(
        [last_layer_gradient(layer, hidden, cotangent) for cotangent in (pixel_cotangent, adversary_cotangent)]
    )
    gradients = accelerator.reduce(gradients, "mean")
    pixel_norm, adversary_norm = gradients.flatten(1).norm(dim=1)
    values_per_image = pixel_cotangent[0].numel()
    ratio: torch.Tensor = (pixel_norm / (adversary_norm + EPSILON)).clamp(max=LARGEST / values_per_image)
    return ratio
