"""Certificate that a VAE may run in fp16: headroom of every layer, and fp16 against fp32 on the same inputs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.export.fp16.audit import SAFE_HEADROOM, Audit, audit
from ldm_vae.export.fp16.probes import Probes, means
from ldm_vae.export.fp16.rescale import Rescaling

GOOD_PSNR = 40.0  # dB: fp16 rounding is then below what 8 bits show


@dataclass(frozen=True)
class Certificate:
    """Measurements of a certificate: psnr in dB, fp16 against fp32 of the same model, by side (peak: 2 for pixels, the
    range of the means for latents; NaN where fp16 is not finite); change: largest fp32 difference that the rescaling
    made, by side (None: nothing was rescaled); limits: sentences that name layers."""

    probes: str
    after: Audit
    psnr: dict[str, float]
    change: dict[str, float] | None = None
    before: Audit | None = None
    factors: dict[str, float] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if fp16 is finite, close to fp32, and has headroom left for other images."""
        return self.after.safe and all(value >= GOOD_PSNR for value in self.psnr.values())

    def lines(self) -> list[str]:
        """Lines for the terminal and, as a list, for the card."""
        found = [f"measured over {self.probes}"]
        if self.before is not None:
            found.append(f"before, {self.before.describe()}")
        found.append(f"{'after' if self.before is not None else 'fp32'}, {self.after.describe()}")
        if self.change is not None:
            found.append(
                f"{len(self.factors)} constants changed, all powers of two; fp32 output moved by at most "
                f"{self.change['encoder']:.2g} (latent means) and {self.change['decoder']:.2g} (pixels in [-1, 1])"
            )
        shown = [f"{side} {_decibel(value)}" for side, value in self.psnr.items()]
        found.append(f"fp16 against fp32: {', '.join(shown)}")
        found += [f"limit: {limit}" for limit in self.limits]
        found.append(f"verdict: {'safe in fp16' if self.passed else 'NOT safe in fp16'}")
        return found


def _decibel(value: float) -> str:
    return "NaN or Inf in fp16" if math.isnan(value) else f"{value:.1f} dB"


@torch.no_grad()
def certify(vae: Any, probes: Probes, rescaling: Rescaling | None = None, before: Audit | None = None) -> Certificate:
    """Audit `vae` (or what became of it by `rescaling`) and run it in fp16 over the same probes.

    Args:
        before: the audit of `vae` that the rescaling was chosen from.
    """
    fixed = vae if rescaling is None else rescaling.vae.to(vae.device)
    after = audit(fixed, probes)
    full = {"encoder": means(fixed, probes.images), "decoder": _pixels(fixed, probes.z)}
    half_model = copy.deepcopy(fixed).half()
    half = {"encoder": means(half_model, probes.images), "decoder": _pixels(half_model, probes.z)}
    peak = {"encoder": float(full["encoder"].max() - full["encoder"].min()), "decoder": 2.0}
    change, factors, limits = None, {}, []
    if rescaling is not None:
        was = {"encoder": means(vae, probes.images), "decoder": _pixels(vae, probes.z)}
        change = {side: float((full[side] - was[side]).abs().max()) for side in full}
        factors, limits = rescaling.factors, list(rescaling.limits)
    limits += [
        f"{name} reaches {value:,.4g} and nothing behind it can take a factor back"
        for name, value in after.largest.items()
        if value * SAFE_HEADROOM > 65_504 and not any(name in limit for limit in limits)
    ]
    psnr = {side: _psnr(half[side], full[side], peak[side]) for side in full}
    return Certificate(probes.describe(), after, psnr, change, before, factors, limits)


def _pixels(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([latents.decode(vae, one[None].to(vae.device)).cpu() for one in z])


def _psnr(came: torch.Tensor, expected: torch.Tensor, peak: float) -> float:
    error = float((came.double() - expected.double()).square().mean())
    return 10 * math.log10(peak**2 / max(error, 1e-30)) if math.isfinite(error) else math.nan
