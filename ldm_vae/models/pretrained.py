"""The network of `init_from` as it is, of any class: to fine-tune what no other `model.kind` builds."""

from __future__ import annotations

from typing import Any, Literal

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck, PointBottleneck
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels


class Config(Part):
    """A network that `init_from` brings with its shape."""

    kind: Literal["pretrained"] = "pretrained"
    in_channels: Channels = 3
    """Channels of an image."""

    def shape(self) -> dict[str, Any]:
        """Nothing that a config could ask for."""
        return {}

    def build_from(self, base: Any, place: str) -> Any:
        """The network, of that of init_from: itself."""
        return base

    def bottleneck(self, vae: Any) -> Bottleneck:
        return PointBottleneck() if geometry_of(vae).is_point else GaussianBottleneck(vae)
