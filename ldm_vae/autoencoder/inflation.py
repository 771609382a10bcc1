"""Inflation: an AutoencoderKL as a class of clips that decodes a first frame, at first, exactly as it decodes an image.

A kernel [o, i, h, w] becomes the last of the taps of one [o, i, t, h, w], the only one that sees a causal layer's
current frame; the others are zero. Layers that the image network has no weights for start as what changes nothing: the
last layer of a residual branch at zero, a layer between as many channels an identity. So

    AutoencoderKLAllegro          t 4: encodes frames 0, 4, 8, ... as images, decodes each as four frames
    AutoencoderKLMagvit           t 4: frames 0, 4, 8, ... as well, each decoded as itself and the three before it
    AutoencoderKLTemporalDecoder  t 1: encodes and decodes every frame as an image

No other class holds one exactly (0.42.1): HunyuanVideo repeats edges and samples around other pixels, CogVideoX and
Mochi have norms over several frames, Wan, Qwen-Image, LTX and VidTok norms of another kind.

Legend: o i channels, t h w sides of a kernel, C image channels, T frames, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLAllegro, AutoencoderKLMagvit, AutoencoderKLTemporalDecoder
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an

# of the largest value: convolutions of another rank add in another order, 1e-6 measured; what is not the image
# network's function differs by 0.01 and more
TOLERANCE = 1e-4
# names of a class of clips => the image network's
_NAMES = (
    (r"\.spatial_res_block\.", "."),
    (r"\.convs\.", ".resnets."),
    (r"sampler\.", "samplers.0."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
# of layers that it has no weights for: the last of a residual branch, and those from channels to as many
_ENDS = (
    r"temporal_res_block\.conv2\.|temp_conv\w*\.(\d+\.)?conv4\.2\.|temp_conv_(in|out)\.|mid_block\.convs\.\d+\.conv2\.|"
    r"attentions\.\d+\.to_out\."
)
_BETWEEN = r"^(post_)?quant_conv\.|time_conv_out\."


def inflate(base: Any, into: str, place: str = "VAE") -> Any:
    """A network of the class `into`, one of CLASSES, with the weights of an AutoencoderKL. What is new and not
    the end of a branch keeps its random weights.

    Args:
        place: what opens the sentence of an error.

    Raises:
        UsageError: `base` is of another class, or this class cannot hold it: a tensor has no place there, or the first
            frame of a clip is encoded or decoded in another way than an image.
    """
    if not isinstance(base, AutoencoderKL):
        raise UsageError(f"{place}: expected an AutoencoderKL to make {an(into)} of, got {an(type(base).__name__)}")
    vae = CLASSES[into](base.config, place)
    own, theirs = vae.state_dict(), base.state_dict()
    sources = {name: _source(name) for name in own}
    left = [name for name in theirs if name not in {*sources.values()}]
    left += [there for name, there in sources.items() if there in theirs and not _fits(theirs[there], own[name])]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        others = " or ".join(name for name in CLASSES if name != into)
        raise UsageError(
            f"{place}: {an(into)} has no place for its {left[0]}{more}; expected an AutoencoderKL without such layers, "
            f"or model.into {others}"
        )
    for name, value in own.items():
        if (there := sources[name]) in theirs:
            value.zero_()
            (value[:, :, -1] if value.ndim == 5 > theirs[there].ndim else value).copy_(theirs[there])
        elif re.search(_ENDS, name):
            value.zero_()
        elif re.search(_BETWEEN, name):
            value.zero_() if value.ndim == 1 else nn.init.dirac_(value)
    vae.load_state_dict(own)
    _compare(vae.eval(), base.eval(), place)
    return vae


def _source(name: str) -> str:
    for pattern, there in _NAMES:
        name = re.sub(pattern, there, name)
    return name


def _fits(image: torch.Tensor, clip: torch.Tensor) -> bool:
    frames = clip.ndim == 5 > image.ndim
    return image.shape == (clip.shape[:2] + clip.shape[3:] if frames else clip.shape)


@torch.no_grad()
def _compare(vae: Any, base: Any, place: str) -> None:
    """Raises UsageError unless the first frame of a clip of several latent frames is that of an image."""
    geometry, lengths = geometry_of(base), lengths_of(vae)
    side, frames = 8 * geometry.factor, lengths.first + lengths.step
    noise = torch.rand(1, geometry.in_channels, frames, side, side, generator=torch.Generator().manual_seed(0))
    clip = noise.to(base.dtype) * 2 - 1
    ours, image = latents.encode(vae, clip), latents.encode(base, clip[:, :, 0])
    pairs = {
        "mean": (ours.mean[:, :, 0], image.mean),
        "log-variance": (ours.logvar[:, :, 0], image.logvar),
        "decoded image": (latents.decode(vae, ours.mean)[:, :, 0], latents.decode(base, image.mean)),
    }
    for what, (found, expected) in pairs.items():
        off = float((found - expected).abs().max() / expected.abs().max())
        if not off <= TOLERANCE:
            raise UsageError(
                f"{place}: as {an(type(vae).__name__)} it gives the first frame of a clip another {what} than an "
                f"image's, by {off:.2g} of its largest value; expected {TOLERANCE:g} at most"
            )


# --- the classes ------------------------------------------------------------------------------------------------------


def _temporal_decoder(config: Mapping[str, Any], place: str) -> Any:
    return AutoencoderKLTemporalDecoder(**_common(config), down_block_types=config["down_block_types"])


def _allegro(config: Mapping[str, Any], place: str) -> Any:
    count = _resolutions(config, place)
    return AutoencoderKLAllegro(
        **_common(config),
        norm_num_groups=config["norm_num_groups"],
        down_block_types=("AllegroDownBlock3D",) * count,
        up_block_types=("AllegroUpBlock3D",) * count,
        temporal_downsample_blocks=[at < 2 for at in range(count)],
        temporal_upsample_blocks=[count - 3 <= at < count - 1 for at in range(count)],
    )


def _magvit(config: Mapping[str, Any], place: str) -> Any:
    # of encoder and decoder alike, from the first block on: those of space alone, two that halve or double the frames,
    # and the last, which has no sampler
    spatial = _resolutions(config, place) - 3
    types = ["Spatial{}Block3D"] * spatial + ["SpatialTemporal{}Block3D"] * 3
    return AutoencoderKLMagvit(
        **_common(config),
        norm_num_groups=config["norm_num_groups"],
        down_block_types=[one.format("Down") for one in types],
        up_block_types=[one.format("Up") for one in types],
    )


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """scaling_factor is 1 until it is measured, as that of every network that training begins with."""
    names = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
    return {name: config[name] for name in names} | {"scaling_factor": 1.0}


def _resolutions(config: Mapping[str, Any], place: str) -> int:
    count = len(config["block_out_channels"])
    if count < 3:
        raise UsageError(
            f"{place}: has {count} resolutions; expected at least 3, between which frames are halved twice, or "
            "AutoencoderKLTemporalDecoder"
        )
    return count


CLASSES = {
    "AutoencoderKLAllegro": _allegro,
    "AutoencoderKLMagvit": _magvit,
    "AutoencoderKLTemporalDecoder": _temporal_decoder,
}
