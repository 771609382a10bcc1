"""A class of clips with the weights of the AutoencoderKL of `init_from`: at first, the first frame of a clip is encoded
and decoded exactly as an image by it (ldm_vae/autoencoder/inflation.py)."""

from __future__ import annotations

from typing import Any, Literal

from ldm_vae.autoencoder.bottleneck import Bottleneck, GaussianBottleneck
from ldm_vae.autoencoder.inflation import inflate
from ldm_vae.core.config import Part
from ldm_vae.core.numbers import Channels

Into = Literal["AutoencoderKLAllegro", "AutoencoderKLMagvit", "AutoencoderKLTemporalDecoder"]


class Config(Part):
    """A class of clips that `init_from`, a network of images, is made into."""

    kind: Literal["inflated"] = "inflated"
    into: Into = "AutoencoderKLAllegro"
    """Class: Allegro's for any AutoencoderKL, clips of 24 + 16 k frames, t 4; Magvit for one without attention, 1 + 4 k
    frames, causal; TemporalDecoder for one without post_quant_conv, each frame encoded by itself."""
    in_channels: Channels = 3
    """Channels of an image."""

    def shape(self) -> dict[str, Any]:
        """Nothing that a config could ask for."""
        return {}

    def build_from(self, base: Any, place: str) -> Any:
        """The network, of that of init_from; `place` opens the sentence of an error."""
        return inflate(base, self.into, place)

    def bottleneck(self, vae: Any) -> Bottleneck:
        return GaussianBottleneck(vae)
