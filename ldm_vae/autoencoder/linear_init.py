"""`init: linear`: an AutoencoderKL, VQModel or AutoencoderKLWan whose first forward is the linear code
(`linear_code.py`).

docs/training.md derives it. The tools, within the weights of diffusers' own modules:

- SiLU is no obstacle: silu(x) - silu(-x) = x. A signal s that has to pass one enters as the pair +s, -s.
- GroupNorm is made a fixed scale: two channels of every group hold +K and -K, which outweigh all signals, so that the
  group's mean is 0 and its standard deviation K sqrt(2 / m), m channels a group; the affine weight multiplies it back.
- Space to depth: a strided convolution sees the 2 x 2 pixels of its place (its first two taps: diffusers pads right and
  below).
- Depth to space: after nearest upsampling a pixel equals its right neighbour exactly if its column is even. The first
  residual block behind an upsampler adds up absolute differences to the right and below, the second shuts a gate where
  they are not zero: a linear form for even columns, one for even rows, one for both, and one for all pixels make up any
  2 x 2 pixels.

A level i holds patches of 2^i pixels, as coordinates y_i of unit variance in the components of the code's own
sub-patches: y_0 the colour, y_L (f = 2^L) the code. Where a width has too few channels the smallest are left out.

Of clips, a level may join two frames (Wan's time convolutions). Its coordinates w of both are linear in those of each,
v: w = A v_1 + B v_2, and v_1 = C w, v_2 = D w. The first frame of a clip, which the network takes past these
convolutions, is one that does not move: w = (A + B) v, v = (C + D) w / 2. The strided convolution therefore writes
(A + B) v where w stands and v beside it, and the decoder reads v as (C + D) w / 2 plus channels that are 0 in the first
frame.

Legend: m channels of a group, n signals, C image channels, c latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder.linear_code import LinearCode
from ldm_vae.autoencoder.linear_decoder import start_decoder
from ldm_vae.autoencoder.linear_layers import (
    Channels,
    add_noise,
    as_pairs,
    check_room,
    clear_attention,
    clear_residuals,
    groups_of,
    halves,
    inner_map,
    inverse_map,
    quarters,
    set_rows,
)
from ldm_vae.autoencoder.linear_parts import Level, Side, shortcut_of, side_of
from ldm_vae.core.errors import UsageError

LOGVAR = -7.0  # of the posterior: noise of 3 % of a latent's standard deviation


@torch.no_grad()
def start_linear(vae: Any, code: LinearCode, scale: torch.Tensor | None = None) -> None:
    """Set the weights of `vae`, fresh from its config, in place: latents = scale * code.encode(images).

    Args:
        scale: [c]; 1 by default.

    Raises:
        UsageError: its widths or groups have no place for the code; the sentence names the field.
    """
    scale = torch.ones(code.latent_channels, dtype=torch.float64) if scale is None else scale
    # a network of shortcuts: whatever is set below is all that the first forward computes, apart from NOISE
    clear_residuals(vae)
    clear_attention(vae)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            set_rows(conv, range(conv.out_channels), torch.eye(conv.out_channels, conv.in_channels))
    _start_encoder(side_of(vae.encoder), code, scale)
    start_decoder(side_of(vae.decoder), code, scale)


# --- encoder ----------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """A convolution that writes a level's coordinates: rows [n, in, ...]; of two frames that `time` joins, rows for the
    coordinates of one of them, and ways [2, n, their number] from these to n."""

    conv: Any
    rows: torch.Tensor
    bias: torch.Tensor
    time: Any = None
    ways: torch.Tensor | None = None


def _start_encoder(encoder: Side, code: LinearCode, scale: torch.Tensor) -> None:
    blocks, count = encoder.levels, code.latent_channels
    levels = len(blocks) - 1
    last = Channels(encoder.conv_out.in_channels, groups_of(encoder.norm_out))
    check_room(last, count)
    maps, befores = _encoder_maps(blocks, code, scale)
    colour = code.mean.view(-1, code.channels).mean(dim=0)
    rest = code.mean - colour.repeat(len(code.mean) // code.channels)

    # what writes each level: conv_in, then the strided convolutions, with shortcuts that carry it to a new width
    entry = inverse_map(maps[0])
    nothing = torch.zeros(1, dtype=torch.float64)
    writers = [Writer(encoder.conv_in, entry, -entry @ colour)]
    frames = 1
    for level, block in enumerate(blocks):
        shortcut = shortcut_of(block.resnets[0]) if block.resnets else None
        if shortcut is not None:
            writers.append(Writer(shortcut, torch.eye(maps[level].shape[1], dtype=torch.float64), nothing))
        if level < levels:
            # the next level's coordinates are linear in those that this level holds of the four quarters
            weight = quarters(inverse_map(befores[level]).T, 2 ** (level + 1), frames)  # [2, 2, P / 4, n of the next]
            taps = (weight.mT @ maps[level]).permute(2, 3, 0, 1)
            # the rest of the mean (beyond its colour) once, where the patch is whole: at the last level
            bias = -inverse_map(maps[-1]) @ rest if level == levels - 1 else nothing
            ways = None
            if block.time is not None:
                ways = halves(inverse_map(maps[level + 1]).T).mT @ befores[level]
                frames *= 2
            writers.append(Writer(block.sampler, taps, bias, block.time, ways))
    for place, writer in enumerate(writers):
        final = place == len(writers) - 1  # in front of the last norm
        _write(writer, last.both(0, count) if final else None)

    # the head: constants from the last residual block on, the mean linear, the variance constant
    last.add_constants(encoder.middle.conv2.bias)
    last.set_norm(encoder.norm_out)
    add_noise(encoder.conv_out)
    set_rows(encoder.conv_out, range(count), last.read(0, count))
    logvar = range(count, encoder.conv_out.out_channels)  # none in a VQModel
    set_rows(encoder.conv_out, logvar, torch.zeros(len(logvar), last.width), LOGVAR)


def _encoder_maps(
    blocks: list[Level], code: LinearCode, scale: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Maps of coordinates to patches, level by level: the last one's are the latents themselves. And those of the
    levels from 1 on before two frames were joined, which are the same where none are."""
    maps: list[torch.Tensor] = [code.components * code.deviations / scale]
    befores: list[torch.Tensor] = []
    inner, frames = code.components * code.deviations, code.frames
    for level in range(len(blocks) - 1, 0, -1):
        before, width = maps[0], blocks[level - 1].sampler.out_channels
        if blocks[level - 1].time is not None:
            # beside w; the latents may be pairs, with two constants
            taken = 2 * code.latent_channels + 2 if level == len(blocks) - 1 else before.shape[1]
            if width - taken < code.latent_channels:
                raise UsageError(
                    f"init: linear needs a width of {taken + code.latent_channels} where two frames are joined, as "
                    f"each has {code.latent_channels} numbers of its own beside theirs, got {width}; a larger one, "
                    "fewer latent channels or init: noise would do"
                )
            inner, frames = inner_map(halves(inner), width - taken), frames // 2
            before = sized(inner, code.channels)
        befores.insert(0, before)
        # where two frames are joined below, w and v share the channels
        joined = level > 1 and blocks[level - 2].time is not None
        most = blocks[level - 2].sampler.out_channels // 2 if joined else None
        inner = inner_map(quarters(inner, 2**level, frames), most)
        maps.insert(0, sized(inner, code.channels))
    return maps, befores


def sized(maps: torch.Tensor, channels: int) -> torch.Tensor:
    """Of size 1 in flat patches: what the code leaves out makes the small components larger than their deviations."""
    sized: torch.Tensor = maps / maps.norm(dim=0) * (len(maps) / channels) ** 0.5
    return sized


def _write(writer: Writer, pairs: list[int] | None) -> None:
    """Set its rows; as `pairs`, for the norm that follows."""
    conv, rows, bias = writer.conv, writer.rows, writer.bias
    padded = torch.zeros(len(rows), conv.in_channels, *rows.shape[2:], dtype=torch.float64)
    padded[:, : rows.shape[1]] = rows
    still = padded if writer.ways is None else torch.einsum("wv,v...->w...", writer.ways.sum(dim=0), padded)
    outputs = list(range(len(still))) if pairs is None else pairs
    beside = 0 if writer.ways is None else len(padded)
    if len(outputs) + beside > conv.out_channels:
        raise UsageError(
            f"model.block_out_channels: init: linear has {len(still)} numbers to carry where {conv.out_channels} "
            "channels are; expected at least so many, or init: noise"
        )
    signals = as_pairs if pairs is not None else torch.Tensor.contiguous
    bias = signals(bias.expand(len(still)))
    add_noise(conv)
    set_rows(conv, outputs, signals(still), bias)
    if writer.ways is None:
        return
    free = [channel for channel in range(conv.out_channels) if channel not in outputs][:beside]
    set_rows(conv, free, padded)
    add_noise(writer.time)
    writer.time.weight[outputs] = 0
    for tap, way in zip((1, 2), writer.ways, strict=True):  # the first tap sees the frame before the two
        writer.time.weight[torch.tensor(outputs)[:, None], free, tap, 0, 0] = signals(way).to(conv.weight)
    writer.time.bias[outputs] = bias.to(conv.bias)
