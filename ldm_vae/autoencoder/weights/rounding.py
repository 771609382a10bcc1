"""Weights that were rounded to 8-bit floats: read as fp32, and the cost of the rounding.

e4m3 keeps 3 bits behind the leading one, e5m2 keeps 2 (Micikevicius et al. 2022, arXiv:2209.05433). What the weights
were before is gone: each was anywhere within half a unit of its last place. The cost is therefore measured with weights
drawn from there: how far apart two pictures are that come from the rounded ones and from such ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import image_channels
from ldm_vae.autoencoder.weights.files import Entry, Weights, few
from ldm_vae.core.errors import UsageError

# dtype => bits behind the leading one, exponent of the smallest normal number
FORMATS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}
SCALES = ("scale_weight", "weight_scale")  # the weight is the stored one times this
OTHERS = ("scale_input", "input_scale", "comfy_quant")  # of the activations, and a word on the format
MARK = "scaled_fp8"  # an empty tensor: that there are scales
SIDE = 64  # px of the picture that the cost is measured on


@dataclass(frozen=True)
class Rounding:
    """The rounding of a tensor: its dtype and the scale that it was stored under."""

    dtype: torch.dtype
    scale: torch.Tensor

    def unit(self, weight: torch.Tensor) -> torch.Tensor:
        """The distance of neighbouring numbers of the format around each weight."""
        bits, smallest = FORMATS[self.dtype]
        stored = (weight / self.scale).abs().clamp(min=2.0**smallest)  # below it the numbers stand no closer
        _, exponent = torch.frexp(stored)  # of a mantissa in [0.5, 1)
        return torch.ldexp(torch.ones_like(weight), exponent - 1 - bits) * self.scale.abs()


def is_eight_bit(value: torch.Tensor) -> bool:
    """True when a tensor is stored as a float of 8 bits."""
    return value.dtype.is_floating_point and value.dtype.itemsize == 1


def companions(name: str, entries: Mapping[str, Entry]) -> list[str]:
    """Names of the tensors beside a weight `name` that belong to its rounding."""
    layer = name.rpartition(".")[0]
    return [found for end in (*SCALES, *OTHERS) if (found := f"{layer}.{end}" if layer else end) in entries]


def scale_of(name: str, entries: Mapping[str, Entry]) -> str | None:
    """The tensor that a weight `name` is to be multiplied by, where there is one."""
    layer, _, kind = name.rpartition(".")
    found = [f"{layer}.{end}" for end in SCALES if kind == "weight" and f"{layer}.{end}" in entries]
    return found[0] if found else None


def restored(value: torch.Tensor, name: str, weights: Weights) -> tuple[torch.Tensor, Rounding]:
    """An 8-bit tensor in fp32, times its scale where one stands beside it.

    Raises:
        UsageError: its format or its scale is none that is known.
    """
    if value.dtype not in FORMATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FORMATS)
        raise UsageError(f"{weights.place}: tensor {few([name])} is {value.dtype}; of 8-bit floats {known} are read")
    scale, scaled = torch.ones(()), scale_of(name, weights.entries)
    if scaled is not None:
        scale = weights.entries[scaled].read().float()
        if scale.numel() not in (1, len(value)):
            raise UsageError(
                f"{weights.place}: tensor {few([scaled])} is {tuple(scale.shape)}; one scale, or one for each of "
                f"{len(value)} outputs, is read"
            )
        scale = scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    return value.float() * scale, Rounding(value.dtype, scale)


# --- the cost ---------------------------------------------------------------------------------------------------------


def cost(network: torch.nn.Module, rounded: Mapping[str, Rounding]) -> str:
    """The sentence on a network whose tensors `rounded` were 8-bit floats; it is in fp32 then."""
    state = network.state_dict()
    signal = sum(float(state[name].double().square().sum()) for name in rounded)
    noise = sum(float(how.unit(state[name]).double().square().sum()) / 12 for name, how in rounded.items())
    kinds = " and ".join(sorted({str(how.dtype).removeprefix("torch.") for how in rounded.values()}))
    below = 10 * math.log10(max(signal, 1e-30) / noise)
    said = f"{len(rounded)} of {len(state)} tensors were rounded to {kinds}, {below:.0f} dB below the weights"
    psnr = _psnr(network, rounded) if hasattr(network, "encode") else None
    if psnr is None:
        return said
    return f"{said}; a picture is reconstructed with {psnr:.0f} dB (PSNR) of what the unrounded ones would give"


@torch.no_grad()
def _psnr(vae: Any, rounded: Mapping[str, Rounding]) -> float:
    """PSNR of a synthetic picture, reconstructed by the rounded weights and by some that they may have been."""
    generator = torch.Generator().manual_seed(0)
    other = copy.deepcopy(vae)
    for name, value in other.state_dict().items():
        if name in rounded:
            value += rounded[name].unit(value) * (torch.rand(value.shape, generator=generator) - 0.5)
    # a smooth picture with an edge: what photographs are made of
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    channels = [0.6 * torch.sin(3 * rows + k) * torch.cos(2 * columns - k) for k in range(image_channels(vae))]
    picture = torch.stack(channels)[None] + 0.3 * (rows > columns)
    first, second = (latents.decode(one, latents.encode(one, picture).mean) for one in (vae, other))
    error = float((first - second).double().square().mean())
    return 10 * math.log10(4 / error) if error > 0 else math.inf  # pixels of [-1, 1]
