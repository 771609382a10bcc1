"""Binary spherical quantisation (BSQ; Zhao, Xiong & Kraehenbuehl, "Image and video tokenization with binary spherical
quantization", 2024): LFQ of vectors at unit length, whose codes are on the unit sphere too, so that the error of
quantisation is bounded. With the term losses.code_entropy.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ldm_vae.autoencoder.codebooks import Codebooks, binary
from ldm_vae.core.config import Part
from ldm_vae.quantizers import BinaryQuantizer


class Config(Part):
    """Sign of each channel of a vector on the unit sphere, +-1/sqrt(channels)."""

    kind: Literal["bsq"] = "bsq"
    temperature: float = Field(1.0, gt=0)
    """Of the distribution of codes, softmax of -|vector - code|^2 / temperature, whose entropies are the term
    losses.code_entropy."""

    def beside(self, channels: int) -> Codebooks:
        """The codes of a network whose z has so many channels."""
        return binary("bsq", channels)

    def build(self, vae: Any) -> BinaryQuantizer:
        return BinaryQuantizer(vae, True, self.temperature)
