"""Checks for NaN and infinity: in weights at loading, and in a network's output where it is measured or shown.

NaN compares as neither worse nor better: clamped and rounded it is a black picture with a PSNR of its own. Training has
its own guard (`training/step.py`), and `encode` puts single images aside (`latent_store/write/encoder.py`).

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.core.errors import UsageError, WorkError


def check_weights(network: nn.Module, name: str) -> None:
    """Raises UsageError that names the first tensor with NaN or infinity; 0.1 s for 84 M parameters on one core."""
    found = [(key, tensor) for key, tensor in network.state_dict().items() if not _is_finite(tensor)]
    if not found:
        return
    key, first = found[0]
    count = int((~torch.isfinite(first)).sum())
    more = f", and so do {len(found) - 1} more tensors" if len(found) > 1 else ""
    raise UsageError(
        f"{name}: {key} holds NaN or infinity in {count:,} of {first.numel():,} weights{more}; expected finite ones: "
        "an earlier checkpoint of a training that diverged, or the fp32 file of a conversion that overflowed"
    )


def encode(vae: Any, pixels: torch.Tensor, keys: Sequence[str] = ()) -> Moments:
    """`latents.encode`; keys: of the images. Raises WorkError, naming the layer, where the moments are not finite."""
    moments = latents.encode(vae, pixels)
    for values in (moments.mean, moments.logvar):
        _check(vae, pixels, values, lambda: latents.encode(vae, pixels), keys)
    return moments


def decode(vae: Any, z: torch.Tensor, keys: Sequence[str] = ()) -> torch.Tensor:
    """`latents.decode`; keys: of the images. Raises WorkError, naming the layer, where the pixels are not finite."""
    pixels = latents.decode(vae, z)
    _check(vae, z, pixels, lambda: latents.decode(vae, z), keys)
    return pixels


def decode_indices(vae: Any, indices: torch.Tensor) -> torch.Tensor:
    """`latents.decode_indices`. Raises WorkError, naming the layer, where the pixels are not finite."""
    pixels = latents.decode_indices(vae, indices)
    _check(vae, indices, pixels, lambda: latents.decode_indices(vae, indices), ())
    return pixels


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):  # ten times faster than looking at each
        return True
    return bool(torch.isfinite(tensor).all())  # large finite numbers too have an infinite sum


def _check(
    vae: Any, given: torch.Tensor, values: torch.Tensor, again: Callable[[], object], keys: Sequence[str]
) -> None:
    if _is_finite(values):
        return
    bad = (~torch.isfinite(values).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    image = f" for {keys[bad[0]]}" if bad[0] < len(keys) else ""
    name = vae.config.get("_name_or_path", "")
    who = f"VAE {name}" if name else "VAE"
    if not _is_finite(given):
        raise WorkError(f"{who}: is given NaN or infinity{image}: what made these latents or pixels has diverged")
    raise WorkError(
        f"{who}: {_first_layer(vae, again)} gives NaN or infinity{image}, though its weights are finite: they are too "
        "large for what this network computes, as after a training that diverged"
    )


def _first_layer(vae: nn.Module, again: Callable[[], object]) -> str:
    """The name of the first layer whose output is not finite, computing once more."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not _is_finite(output):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in vae.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        again()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else "the network"
