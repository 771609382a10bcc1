"""Audit of activations: the largest of every layer in fp32, and its distance from fp16's largest number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.core.errors import WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.export.fp16.probes import Probes

LARGEST = 65_504.0  # fp16's largest number
SAFE_HEADROOM = 4.0  # below it an image somewhat outside the probes may overflow: force_upcast stays on


@dataclass
class Audit:
    """Result of an audit. largest: |activation| by module name, of all that have weights; sides: `encoder` or
    `decoder`, by module name; variance: of a GroupNorm's input, the smallest group's, averaged over the probes."""

    largest: dict[str, float] = field(default_factory=dict)
    sides: dict[str, str] = field(default_factory=dict)
    variance: dict[str, float] = field(default_factory=dict)

    def of(self, side: str) -> dict[str, float]:
        """The layers of `encoder` or `decoder`, quant convolutions included."""
        return {name: value for name, value in self.largest.items() if self.sides[name] == side}

    def worst(self, side: str) -> tuple[str, float]:
        """(layer, value) of the largest activation of `encoder` or `decoder`."""
        return max(self.of(side).items(), key=lambda row: row[1])

    def headroom(self, side: str) -> float:
        """Factor by which the largest activation would fit below 65,504."""
        return LARGEST / max(self.worst(side)[1], 1e-30)

    @property
    def safe(self) -> bool:
        """True if both halves may run in fp16."""
        return min(self.headroom("encoder"), self.headroom("decoder")) >= SAFE_HEADROOM

    def describe(self) -> str:
        """One sentence for a card or a terminal."""
        parts = []
        for side in ("encoder", "decoder"):
            name, value = self.worst(side)
            parts.append(f"{side} {value:,.4g} at {name} ({self.headroom(side):,.3g} x below {LARGEST:,.0f})")
        return "largest activation: " + "; ".join(parts)


@torch.no_grad()
def audit(vae: Any, probes: Probes) -> Audit:
    """Run encoder and decoder in fp32 over the probes. Raises WorkError if they give NaN or Inf even so."""
    found = Audit()
    sums: dict[str, torch.Tensor] = {}
    # the outermost module's output is that of its last layer
    inner = [(name, module) for name, module in vae.named_modules() if name and any(True for _ in module.parameters())]
    hooks = []
    try:
        for side, run, values in (("encoder", latents.encode, probes.images), ("decoder", latents.decode, probes.z)):
            hooks = [module.register_forward_hook(_record(name, side, found, sums)) for name, module in inner]
            for value in Progress(values, desc=f"audit {side}", unit="probe", leave=False):
                run(vae, value[None].to(vae.device, torch.float32))
            while hooks:
                hooks.pop().remove()
    finally:
        for hook in hooks:
            hook.remove()
    bad = [name for name, value in found.largest.items() if value == float("inf")]
    if bad:
        raise WorkError(f"audit: {bad[0]} gives NaN or Inf even in fp32")
    runs = {"encoder": len(probes.images), "decoder": len(probes.z)}
    found.variance = {name: float(total.min()) / runs[found.sides[name]] for name, total in sums.items()}
    return found


def _record(name: str, side: str, found: Audit, sums: dict[str, torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if not torch.is_tensor(output):  # its parts are those of modules inside
            return
        found.sides.setdefault(name, side)
        value = float(output.abs().max())
        value = value if value == value else float("inf")
        found.largest[name] = max(found.largest.get(name, 0.0), value)
        if isinstance(module, nn.GroupNorm):
            groups = inputs[0].double().reshape(inputs[0].shape[0], module.num_groups, -1)
            variance = groups.var(dim=2, correction=0).sum(dim=0)
            sums[name] = sums.get(name, torch.zeros_like(variance)) + variance

    return hook
