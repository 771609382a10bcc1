"""Rescale a VAE so that its activations fit fp16: powers of two only, no retraining.

Weights change by exact factors in fp32; the output changes only by GroupNorm's epsilon (1e-6), which does not scale
with its input. So a stretch is made only as small as wanted, never so small that epsilon or fp16's subnormal weights
matter; where that leaves too little headroom, the layer is named. The published fp16 VAE of SDXL was a fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm_vae.export.diffusers_folder import configured_copy
from ldm_vae.export.fp16.audit import LARGEST, Audit
from ldm_vae.export.fp16.structure import Structure, structure_of

WANTED_HEADROOM = 16.0
SMALLEST_VARIANCE = 1e-3  # a thousand times epsilon: the normalised values change by 5e-4 at most
SMALLEST_WEIGHT = 2.0**-14  # fp16's smallest normal number, for a layer's median weight


@dataclass
class Rescaling:
    """The rescaled model; factor by the layer that begins what was scaled; what stood in the way, in sentences."""

    vae: Any
    factors: dict[str, float] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)


def rescale(vae: Any, found: Audit) -> Rescaling:
    """A copy of `vae` whose activations, as `found` in an audit, fit fp16, with WANTED_HEADROOM where possible."""
    structure = structure_of(vae)
    result = Rescaling(configured_copy(vae))
    medians = {
        name.removesuffix(".weight"): float(value.abs().median())
        for name, value in vae.state_dict().items()
        if name.endswith(".weight")
    }
    for stretch in structure.stretches:
        before = 1.0 if stretch.before is None else result.factors.get(stretch.before.start, 1.0)
        written = {writer: medians[writer] for writer in stretch.writers} | {
            stretch.start: medians[stretch.start] / before
        }
        _choose(result, found, stretch.start, stretch.sites, written, stretch.norms)
    for branch in structure.branches:
        written = {branch.convolution: medians[branch.convolution]}
        _choose(result, found, branch.convolution, [branch.convolution], written, [branch.norm])
    for chain in structure.chains:
        factor = _wanted(found.largest[chain.first])
        if factor < 1.0:
            result.factors[chain.name] = factor
    scale_by(result.vae, structure, result.factors)
    return result


def scale_by(vae: Any, structure: Structure, factors: Mapping[str, float]) -> None:
    """Apply factors in place; those of layers that are not named are 1."""
    multiply = _Multiplier(vae)
    for chain in structure.chains:
        factor = factors.get(chain.name, 1.0)
        multiply(chain.first, factor, factor)
        multiply(chain.second, 1.0 / factor, 1.0)
    for stretch in structure.stretches:
        factor = factors.get(stretch.start, 1.0)
        before = 1.0 if stretch.before is None else factors.get(stretch.before.start, 1.0)
        multiply(stretch.start, factor / before, factor)
        for writer in stretch.writers:
            multiply(writer, factor, factor)
    for branch in structure.branches:
        factor = factors.get(branch.convolution, 1.0)
        multiply(branch.convolution, factor, factor)


class _Multiplier:
    def __init__(self, vae: Any) -> None:
        self.modules = dict(vae.named_modules())

    @torch.no_grad()
    def __call__(self, layer: str, weight: float, bias: float) -> None:
        module = self.modules[layer]
        # new tensors: the old ones may be shared with the model that was copied
        module.weight = torch.nn.Parameter(module.weight * weight, requires_grad=False)
        if module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias * bias, requires_grad=False)


# --- choosing the factors ---------------------------------------------------------------------------------------------


def _choose(
    result: Rescaling, found: Audit, name: str, sites: list[str], medians: Mapping[str, float], norms: list[str]
) -> None:
    """The factor of one stretch or branch: what headroom wants, but not below what epsilon and the weights bear.

    medians: of the absolute weights that take the factor, by layer.
    """
    worst = max(sites, key=found.largest.__getitem__)
    wanted = _wanted(found.largest[worst])
    if wanted == 1.0:
        return
    floors = {
        f"epsilon of {norm}": math.sqrt(SMALLEST_VARIANCE / found.variance[norm])
        for norm in norms
        if found.variance[norm] > 0
    } | {f"weights of {layer}": SMALLEST_WEIGHT / median for layer, median in medians.items() if median > 0}
    reason = max(floors, key=floors.__getitem__)
    factor = min(1.0, max(wanted, _up(floors[reason])))
    if factor > wanted:
        left = LARGEST / (found.largest[worst] * factor)
        result.limits.append(f"{worst} keeps a headroom of {left:.3g}: the {reason} would not bear more")
    if factor < 1.0:
        result.factors[name] = factor


def _wanted(largest: float) -> float:
    """The largest power of two, at most 1, that brings `largest` below 65,504 / WANTED_HEADROOM."""
    return min(1.0, 2.0 ** math.floor(math.log2(LARGEST / WANTED_HEADROOM / max(largest, 1e-30))))


def _up(value: float) -> float:
    """The next power of two above."""
    return 2.0 ** math.ceil(math.log2(value))
