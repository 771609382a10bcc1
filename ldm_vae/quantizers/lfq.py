"""Lookup-free quantisation (LFQ; Yu et al., "Language model beats diffusion", MAGVIT-v2, ICLR 2024): the sign of each
channel, so 2 ** channels codes need neither a table nor a search. With the term losses.code_entropy.

As a VQModel's codebook all codes are a table of which the nearest is the sign, so the published class gives the same
indices; beside a network of another class nothing but their number is kept.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ldm_vae.autoencoder.codebooks import Codebooks, binary
from ldm_vae.core.config import Part
from ldm_vae.quantizers import BinaryQuantizer


class Config(Part):
    """Sign of each channel, +-1."""

    kind: Literal["lfq"] = "lfq"
    temperature: float = Field(1.0, gt=0)
    """Of the distribution of codes, softmax of -|vector - code|^2 / temperature, whose entropies are the term
    losses.code_entropy."""

    def beside(self, channels: int) -> Codebooks:
        """The codes of a network whose z has so many channels."""
        return binary("lfq", channels)

    def build(self, vae: Any) -> BinaryQuantizer:
        return BinaryQuantizer(vae, False, self.temperature)
