"""Adaptive weight: the factor on the adversary's gradient beside that of the pixel terms (Esser et al. 2021, eq. 7).

The textbook form takes two `autograd.grad(..., retain_graph=True)`, which keep the graphs of LPIPS and discriminator
alive. With the graph cut at the reconstruction, both gradients of the last layer follow from the two cotangents by one
convolution each.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from ldm_vae.autoencoder.last_layer import Call
from ldm_vae.autoencoder.trainable import Reconstruction

EPSILON = 1e-4  # taming-transformers', added to |g_adv|
LARGEST = 1e4  # taming-transformers' clamp of the ratio on the scale of sums; ours is per pixel value, hence / (C*H*W)


def last_layer_gradient(
    layer: Any, calls: Sequence[Call], pixels: torch.Tensor, cotangent: torch.Tensor
) -> torch.Tensor:
    """Gradient of `layer.weight` when the pixels [B, C, H, W], with their graph, have this cotangent."""
    # a mean-L1 cotangent at 256 px is 1 / (B * 196,608): subnormal in fp16, so the convolution sees it divided by its
    # own maximum
    largest = cotangent.abs().amax().clamp_min(torch.finfo(cotangent.dtype).tiny)
    cotangent = cotangent / largest
    outputs = [call.output for call in calls if call.output is not None]
    if not outputs:  # it gives the pixels
        hidden = calls[0].arguments[0].to(cotangent.dtype)
        gradient: torch.Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            hidden, list(layer.weight.shape), cotangent, layer.stride, layer.padding
        )
        return gradient * largest
    # the graph behind it (a clamp, an unpatchify, chunks put together) costs next to nothing, and is needed again
    found = torch.autograd.grad(pixels, outputs, cotangent, retain_graph=True)
    return largest * sum(_weight_gradient(layer, call.arguments, one) for call, one in zip(calls, found, strict=True))


def _weight_gradient(layer: nn.Module, arguments: tuple[Any, ...], cotangent: torch.Tensor) -> torch.Tensor:
    """Of one call with these arguments, by calling the layer again: it may pad or cache in a way of its own. The weight
    of one that is weight-normed is what its norm makes of its parameters."""
    weight = layer.weight.detach().requires_grad_()  # type: ignore[operator]
    given = tuple(one.to(weight.dtype) if torch.is_tensor(one) else one for one in arguments)
    with torch.enable_grad():
        if "weight" in layer._parameters:
            output = functional_call(layer, {"weight": weight}, given)
        else:  # called as a layer, it would make its weight anew
            output = layer._conv_forward(*given, weight, layer.bias)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(output, weight, cotangent.to(output.dtype))
    return gradient


def adaptive_ratio(
    accelerator: Accelerator,
    layer: nn.Module,
    reconstruction: Reconstruction,
    pixel_cotangent: torch.Tensor,
    adversary_cotangent: torch.Tensor,
) -> torch.Tensor:
    """|g_rec| / (|g_adv| + 1e-4), clamped, a scalar: the same on every rank and for every split of the batch.

    The two gradients are averaged over the ranks before their norms are taken, in one collective.
    """
    gradients = torch.stack(
        [
            last_layer_gradient(layer, reconstruction.last_calls, reconstruction.pixels, cotangent)
            for cotangent in (pixel_cotangent, adversary_cotangent)
        ]
    )
    gradients = accelerator.reduce(gradients, "mean")
    pixel_norm, adversary_norm = gradients.flatten(1).norm(dim=1)
    values_per_image = pixel_cotangent[0].numel()
    ratio: torch.Tensor = (pixel_norm / (adversary_norm + EPSILON)).clamp(max=LARGEST / values_per_image)
    return ratio
