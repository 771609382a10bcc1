"""Error of the alpha channel by itself, per image on the 8-bit range."""

from __future__ import annotations

from ldm_vae.metrics.l1 import l1
from ldm_vae.metrics.metric import AlphaMetric
from ldm_vae.metrics.psnr import psnr

NAMES = ("alpha_psnr", "alpha_l1")


def build(name: str) -> AlphaMetric:
    """Build one of NAMES."""
    if name == "alpha_psnr":
        return AlphaMetric(name, "higher", lambda pair: psnr(pair.original[:, 3:], pair.reconstruction[:, 3:]))
    return AlphaMetric(name, "lower", lambda pair: l1(pair.original[:, 3:], pair.reconstruction[:, 3:]))
