"""Fine-tuning: the choice of parameters that learn, and a start from a network with another number of channels.

Legend: c latent channels.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of, some_latents, some_size
from ldm_vae.autoencoder.meta import leaves_of, on_meta, once, shared_without_values, without_values
from ldm_vae.core.errors import UsageError

# the other side; what is on none, a buffer that both use say, counts as the encoder's: a store is then rather stale
DECODER = (
    *("decoder.", "decoder_unet.", "post_quant_conv.", "bn.", "latents_mean", "latents_std"),
    *("out_proj.", "dec_in_proj."),  # of AutoencoderKLKVAEAudio and AutoencoderKLMiniMaxH3Audio
)

# --- freezing ---------------------------------------------------------------------------------------------------------


def set_trainable(vae: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters learn whose diffusers names match; later patterns win, a leading `!` freezes.

    `["decoder.*", "post_quant_conv.*"]` trains the decoder alone, `["*", "!encoder.down_blocks.0.*"]` all but a block.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to learn.
    """
    names = [name for name, _ in vae.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            near = difflib.get_close_matches(pattern.removeprefix("!"), names, n=1, cutoff=0.0)
            raise UsageError(f"trainable: `{pattern}` matches none of the {len(names)} parameters, e.g. {near[0]}")
    for name, parameter in vae.named_parameters():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern.removeprefix("!"))]
        parameter.requires_grad_(bool(matching) and not matching[-1].startswith("!"))
    if not any(parameter.requires_grad for parameter in vae.parameters()):
        raise UsageError(f"trainable: {', '.join(patterns) or 'no pattern'} leaves no parameter to learn")


def encoder_learns(vae: nn.Module) -> bool:
    """True if any parameter between pixels and moments learns; if none does, the encoder needs no graph."""
    return any(parameter.requires_grad for name, parameter in vae.named_parameters() if is_encoders(name))


def is_encoders(name: str) -> bool:
    """True for a tensor, by its diffusers name, that decides what an image is encoded to."""
    return not name.startswith(DECODER)


@once
def idle_parameters(vae: Any, frames: int | None = None) -> tuple[str, ...]:
    """Names of the parameters that the class freezes (AutoencoderRAE's encoder), or that get no gradient from the
    reconstruction of an image or a sound, by one without values: layers for later frames of a clip (Wan), for masks
    (AsymmetricAutoencoderKL).

    frames: of clips; None is an image, or the shortest clip of a class that takes no images.
    """
    shape = (1, geometry_of(vae).in_channels, *some_size(vae, frames))
    with on_meta():
        empty = shared_without_values(vae)
        moments = latents.encode(empty, torch.empty(shape))
        reached = leaves_of(latents.decode(empty, moments.mean), moments.logvar)
    # a codebook is its quantizer's to move (ldm_vae/quantizers)
    books = ("quantize.", "quantizer.")
    named = empty.named_parameters()
    return tuple(name for name, one in named if one not in reached and not name.startswith(books))


@once
def encoder_parts(vae: Any) -> tuple[str, ...]:
    """Names of the parts in front of the latents: the network's own modules with weights of which none gets a gradient
    from a decode without values."""
    with on_meta():
        empty = without_values(vae).requires_grad_(True)
        reached = leaves_of(latents.decode(empty, torch.empty(some_latents(vae).shape)))
    weights = {name: [*part.parameters()] for name, part in empty.named_children()}
    return tuple(name for name, own in weights.items() if own and not any(parameter in reached for parameter in own))


# --- another number of channels ---------------------------------------------------------------------------------------


def resize_channels(base: AutoencoderKL, fresh: AutoencoderKL) -> AutoencoderKL:
    """`fresh` with all of `base` that fits; they differ in latent_channels or in_channels alone.

    Where `fresh` is larger, what reads a new channel starts at zero and what writes one keeps its random weights: with
    more latent channels the moments of the old ones and the decoded image are at first exactly those of `base`.
    """
    ours, is_point = fresh.state_dict(), geometry_of(base).is_point
    for name, theirs in base.state_dict().items():
        # the encoder ends in 2c channels, means before log-variances: each half is resized by itself
        writes_moments = not is_point and name.startswith(("encoder.conv_out.", "quant_conv."))
        reads_moments = not is_point and name == "quant_conv.weight"
        ours[name] = _overlap(theirs, ours[name], 2 if writes_moments else 1, 2 if reads_moments else 1)
    fresh.load_state_dict(ours)
    return fresh


def _overlap(old: torch.Tensor, new: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """`new` [out, in, ...] or [out] with the common part of `old`, in so many blocks of outputs and of inputs."""
    if old.shape == new.shape:
        return old
    result = new.clone()
    kept = min(old.shape[0], new.shape[0]) // outputs
    for block in range(outputs):
        here, there = block * new.shape[0] // outputs, block * old.shape[0] // outputs
        row, source = result[here : here + kept], old[there : there + kept]
        if old.ndim == 1:
            row.copy_(source)
            continue
        row.zero_()  # a kept output does not see a new input
        common = min(old.shape[1], new.shape[1]) // inputs
        for part in range(inputs):
            to, start = part * new.shape[1] // inputs, part * old.shape[1] // inputs
            row[:, to : to + common] = source[:, start : start + common]
    return result
