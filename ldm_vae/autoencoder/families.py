"""Families: what an autoencoder class does not tell by itself, one row a class of diffusers.

Everything else is read from the network at hand: sizes and the kind of its latents by a run without values
(`geometry.py`), moments and pixels from the fields of its outputs (`latents.py`), its sides from its gradients. A class
without a row, a user's own among them, is one of images [B, C, H, W] in [-1, 1] whose normalisation stands in its
config. `signals.py` does what a row says on the way into a network and out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Signal = Literal["image", "video", "audio", "other"]
Law = Literal["config", "batch_norm", "buffers", "inside"]
Layout = Literal["channel", "position", "none"]
Values = Literal["signed", "unit", "imagenet"]


@dataclass(frozen=True)
class Family:
    """A row.

    signal: what it encodes: an `image` [B, C, H, W], a `video`, clips [B, C, T, H, W], or `audio`, sounds [B, C, L].
    law: where its normalisation stands: in `config`, in the `batch_norm` of its patchified channels, in `buffers`
    latents_mean and latents_std, or `inside` encode and decode, so that z is what a diffusion model sees.
    patch: side of the squares of positions that its pipelines make channels of.
    values: of its pixels: in [-1, 1], in [0, 1], or those less ImageNet's mean, over its deviation.
    checkpointing: that of the class is right, where it has one.
    noise: its decoder draws noise, from a generator that its `decode` takes.
    alpha: its images are RGBA, the alpha straight.
    reciprocal: its pipelines multiply by 1 / latents_std, which is rounded first, instead of dividing.
    first, step: clips of first, first + step, first + 2 step, ... frames come back whole; a step of None is its t, the
    frames of a latent frame, and of 0 that there is no other length.
    clamps: its decode ends in a clamp to [-1, 1].
    single: one clip, or sound, a call.
    folded: takes the frames as a batch of images, and their number when it decodes.
    padded: its callers put the first frame t - 1 times more in front.
    frames_first: decodes to [B, T, C, H, W].
    tiled: works in tiles of its own, which are part of what it is.
    sigma_data: of its pipelines' scheduler, which scales the latents.
    unread: keys of its config that none of its pipelines reads.
    mean_by: the keyword, with its value, by which its `encode` gives the mean and not a draw.
    refusal: why it is not served.
    """

    signal: Signal = "image"
    law: Law = "config"
    patch: int = 1
    values: Values = "signed"
    checkpointing: bool = True
    noise: bool = False
    alpha: bool = False
    reciprocal: bool = False
    first: int = 1
    step: int | None = None
    clamps: bool = False
    single: bool = False
    folded: bool = False
    padded: bool = False
    frames_first: bool = False
    tiled: bool = False
    sigma_data: float | None = None
    unread: tuple[str, ...] = ()
    mean_by: tuple[tuple[str, bool], ...] = ()
    refusal: str = ""

    @property
    def is_served(self) -> bool:
        """True for a class of images, clips or sounds, but for those with a reason."""
        return self.signal != "other" and not self.refusal

    @property
    def takes_images(self) -> bool:
        """True where an image is encoded: as itself, or as a clip of one frame."""
        return self.is_served and self.signal != "audio" and self.first == 1


_VIDEO, _AUDIO, _OTHER = Family("video"), Family("audio"), Family("other")
# z is what pipelines of sounds take: no key of their configs scales it
_AS_IT_IS = Family("audio", law="inside")
_VOCODER = Family("audio", refusal="a vocoder, without an encoder")
_NOT_CAUSAL = " that is not causal"
FAMILIES: dict[str, Family] = {
    "AutoencoderKLFlux2": Family(law="batch_norm", patch=2),
    "AutoencoderTiny": Family(checkpointing=False),
    "AutoencoderRAE": Family(law="inside", values="unit"),
    "ConsistencyDecoderVAE": Family(noise=True),
    "AutoencoderKLWan": Family("video", reciprocal=True, clamps=True),
    "AutoencoderKLQwenImage": Family("video", reciprocal=True, clamps=True),
    "AutoencoderKLQwenImage21": Family("video", alpha=True, step=0, clamps=True),
    "AutoencoderKLTemporalDecoder": Family("video", step=1, folded=True),
    "AutoencoderKLAllegro": Family("video", first=24, step=16, single=True, frames_first=True, tiled=True),
    "AutoencoderKLCogVideoX": Family("video", step=8, unread=("shift_factor", "latents_mean", "latents_std")),
    "AutoencoderKLCosmos": Family("video", sigma_data=0.5),
    "AutoencoderKLHunyuanVideo": _VIDEO,
    "AutoencoderKLHunyuanImageRefiner": Family("video", step=1),
    "AutoencoderKLHunyuanVideo15": Family("video", single=True),
    "AutoencoderKLKVAEVideo": Family("video", checkpointing=False),
    "AutoencoderKLLTXVideo": Family("video", law="buffers"),
    "AutoencoderKLLTX2Video": Family("video", law="buffers"),
    "AutoencoderKLMagvit": Family("video", checkpointing=False),
    "AutoencoderKLMiniMaxH3": Family("video", values="imagenet", first=22, step=17, tiled=True),
    "AutoencoderKLMochi": Family("video", step=6),
    "AutoencoderVidTok": Family("video", padded=True),
    "AutoencoderVidTok" + _NOT_CAUSAL: Family("video", first=16, step=16),
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": Family("video", refusal="a decoder that denoises, without an encoder"),
    "AutoencoderOobleck": _AS_IT_IS,
    "AutoencoderSAME": _AS_IT_IS,
    "AutoencoderKLKVAEAudio": _AUDIO,
    "AutoencoderKLMiniMaxH3Audio": Family("audio", clamps=True),
    "AutoencoderKLLTX2Audio": Family("audio", refusal="one of log-mel spectrograms, which takes and gives no sound"),
    "LongCatAudioDiTVae": Family("audio", law="inside", mean_by=(("sample_posterior", False),)),
    # its encode divides by the peak of the whole batch: of each sound alone, neighbours do not matter
    "Cosmos3AVAEAudioTokenizer": Family("audio", law="inside", clamps=True, single=True),
    "MMAudioVAE": Family("audio", refusal="one that decodes to a log-mel spectrogram and not to sound"),
    "MMAudioVocoder": _VOCODER,
    "MiniMaxMusic3Vocoder": _VOCODER,
    "RFD4ProteinaAutoencoder": _OTHER,
    "CausalOobleck": _AS_IT_IS,  # of ours, and so is the next
    "DacAutoencoder": _AS_IT_IS,
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
    if not getattr(getattr(model, "config", None), "is_causal", True):
        known += _NOT_CAUSAL if known + _NOT_CAUSAL in FAMILIES else ""
    return FAMILIES.get(known, Family())


def is_movq(vae: Any) -> bool:
    """True for MoVQ: a VQModel whose vectors before the codebook Kandinsky's pipelines take and decode as they are."""
    return bool(getattr(vae, "config", {}).get("norm_type") == "spatial")
