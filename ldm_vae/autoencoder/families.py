"""Families: what an autoencoder class does not tell by itself, one row a class of diffusers.

Everything else is read from the network at hand: sizes and the kind of its latents by a run without values
(`geometry.py`), moments and pixels from the fields of its outputs (`latents.py`), its sides from its gradients. A class
without a row, a user's own among them, is one of images [B, C, H, W] in [-1, 1] whose normalisation stands in its
config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Signal = Literal["image", "still", "video", "audio", "other"]
Law = Literal["config", "batch_norm", "inside"]
Layout = Literal["channel", "position", "none"]


@dataclass(frozen=True)
class Family:
    """A row.

    signal: what it encodes; `still` is a class of clips [B, C, T, H, W] that pipelines use with one frame.
    law: where its normalisation stands: in `config`, in the `batch_norm` of its patchified channels, or `inside`
    encode and decode, so that z is what a diffusion model sees.
    patch: side of the squares of positions that its pipelines make channels of.
    unit_range: images are in [0, 1] instead of [-1, 1].
    checkpointing: that of the class is right, where it has one.
    noise: its decoder draws noise, from a generator that its `decode` takes.
    alpha: its images are RGBA, the alpha straight.
    reciprocal: its pipelines multiply by 1 / latents_std, which is rounded first, instead of dividing.
    """

    signal: Signal = "image"
    law: Law = "config"
    patch: int = 1
    unit_range: bool = False
    checkpointing: bool = True
    noise: bool = False
    alpha: bool = False
    reciprocal: bool = False

    @property
    def is_served(self) -> bool:
        """True for a class of images, and for one of clips that pipelines use with one frame."""
        return self.signal in ("image", "still")

    def enter(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, C, H, W] in [-1, 1] => the network's input."""
        pixels = pixels * 0.5 + 0.5 if self.unit_range else pixels
        return pixels[:, :, None] if self.signal == "still" else pixels

    def leave(self, decoded: torch.Tensor) -> torch.Tensor:
        """The network's output => pixels [B, C, H, W] in [-1, 1]."""
        decoded = decoded * 2.0 - 1.0 if self.unit_range else decoded
        return decoded[:, :, 0] if self.signal == "still" else decoded


_VIDEO, _AUDIO, _OTHER = Family("video"), Family("audio"), Family("other")
FAMILIES: dict[str, Family] = {
    "AutoencoderKLFlux2": Family(law="batch_norm", patch=2),
    "AutoencoderTiny": Family(checkpointing=False),
    "AutoencoderRAE": Family(law="inside", unit_range=True),
    "ConsistencyDecoderVAE": Family(noise=True),
    "AutoencoderKLWan": Family("still", reciprocal=True),
    "AutoencoderKLQwenImage": Family("still", reciprocal=True),
    "AutoencoderKLQwenImage21": Family("still", alpha=True),
    "AutoencoderKLTemporalDecoder": _VIDEO,
    "AutoencoderKLAllegro": _VIDEO,
    "AutoencoderKLCogVideoX": _VIDEO,
    "AutoencoderKLCosmos": _VIDEO,
    "AutoencoderKLHunyuanVideo": _VIDEO,
    "AutoencoderKLHunyuanImageRefiner": _VIDEO,
    "AutoencoderKLHunyuanVideo15": _VIDEO,
    "AutoencoderKLKVAEVideo": _VIDEO,
    "AutoencoderKLLTXVideo": _VIDEO,
    "AutoencoderKLLTX2Video": _VIDEO,
    "AutoencoderKLMagvit": _VIDEO,
    "AutoencoderKLMiniMaxH3": _VIDEO,
    "AutoencoderKLMochi": _VIDEO,
    "AutoencoderVidTok": _VIDEO,
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": _VIDEO,
    "AutoencoderOobleck": _AUDIO,
    "AutoencoderSAME": _AUDIO,
    "AutoencoderKLKVAEAudio": _AUDIO,
    "AutoencoderKLMiniMaxH3Audio": _AUDIO,
    "AutoencoderKLLTX2Audio": _AUDIO,
    "LongCatAudioDiTVae": _AUDIO,
    "Cosmos3AVAEAudioTokenizer": _AUDIO,
    "MMAudioVAE": _AUDIO,
    "MMAudioVocoder": _AUDIO,
    "MiniMaxMusic3Vocoder": _AUDIO,
    "RFD4ProteinaAutoencoder": _OTHER,
}


@dataclass(frozen=True)
class Variant:
    """Pipelines that read the batch norm of an AutoencoderKLFlux2 in another way than FLUX.2's.

    eps: added to its variance, in place of the config's batch_norm_eps.
    layout: of the values of a square of positions: `channel` first (c, row, column), `position` first (row, column, c),
    or `none`: normalised as patches and given without.
    reciprocal: multiplies by 1 / std, which is rounded first, instead of dividing by std.
    """

    eps: float | None = None
    layout: Layout = "channel"
    reciprocal: bool = False


VARIANTS = {
    "bria_fibo2": Variant(layout="none", reciprocal=True),
    "ernie_image": Variant(eps=1e-5),
    "ideogram4": Variant(layout="position"),
}


def family_of(model: Any) -> Family:
    """The family of a network, of its class or of its class's name."""
    known = model if isinstance(model, str) else (model if isinstance(model, type) else type(model)).__name__
    return FAMILIES.get(known, Family())


def is_movq(vae: Any) -> bool:
    """True for MoVQ: a VQModel whose vectors before the codebook Kandinsky's pipelines take and decode as they are."""
    return bool(getattr(vae, "config", {}).get("norm_type") == "spatial")
