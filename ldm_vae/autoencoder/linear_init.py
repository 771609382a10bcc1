"""`init: linear`: an AutoencoderKL or VQModel whose first forward is the linear code (`linear_code.py`).

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

Legend: m channels of a group, n signals, C image channels, c latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder.linear_code import LinearCode
from ldm_vae.autoencoder.linear_layers import (
    Channels,
    add_noise,
    as_pairs,
    check_room,
    clear,
    clear_residuals,
    inner_map,
    inverse_map,
    quarters,
    set_rows,
)
from ldm_vae.core.errors import UsageError

LOGVAR = -7.0  # of the posterior: noise of 3 % of a latent's standard deviation
SLOPE = 4.0  # silu(SLOPE d) + silu(-SLOPE d) is SLOPE |d|, rounded off below d = 1 / SLOPE
TOGETHER = 1.0  # what the absolute differences of all signals add up to where each is of its root mean square
OPEN = 8.0  # a gate is open at differences of 0 and shut from 1 on; silu(-OPEN) = 0.3 % of it leaks
SHUT = 8.0  # what a shut gate takes off a signal of unit variance
GATE = 2.0  # sharpness of the gates


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
    for module in vae.modules():
        if hasattr(module, "to_out"):  # attention
            clear(module.to_out[0])
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            set_rows(conv, range(conv.out_channels), torch.eye(conv.out_channels, conv.in_channels))
    _start_encoder(vae.encoder, code, scale)
    _start_decoder(vae.decoder, code, scale)


# --- encoder ----------------------------------------------------------------------------------------------------------


def _start_encoder(encoder: Any, code: LinearCode, scale: torch.Tensor) -> None:
    blocks, count = encoder.down_blocks, code.latent_channels
    levels = len(blocks) - 1
    # maps of coordinates to patches, level by level: the last one's are the latents themselves
    maps = [code.components * code.deviations / scale]
    inner = code.components * code.deviations
    for level in range(levels, 0, -1):
        inner = inner_map(inner, 2**level)
        # of size 1 in flat patches: what the code leaves out makes the small components larger than their deviations
        maps.insert(0, inner / inner.norm(dim=0) * 2 ** (level - 1))
    colour = code.mean.view(-1, code.channels).mean(dim=0)
    rest = code.mean - colour.repeat(len(code.mean) // code.channels)
    last = Channels(encoder.conv_norm_out.num_channels, encoder.conv_norm_out.num_groups)
    check_room(last, count)

    # what writes each level: conv_in, then the strided convolutions, with shortcuts that carry it to a new width
    entry = inverse_map(maps[0])
    nothing = torch.zeros(1, dtype=torch.float64)
    writers = [(encoder.conv_in, entry, -entry @ colour)]
    for level, block in enumerate(blocks):
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            writers.append((shortcut, torch.eye(maps[level].shape[1], dtype=torch.float64), nothing))
        if level < levels:
            # the next level's coordinates are linear in those that this level holds of the four quarters
            weight = quarters(inverse_map(maps[level + 1]).T, 2 ** (level + 1))  # [2, 2, P / 4, n of the next]
            taps = (weight.mT @ maps[level]).permute(2, 3, 0, 1)
            # the rest of the mean (beyond its colour) once, where the patch is whole: at the last level
            bias = -inverse_map(maps[-1]) @ rest if level == levels - 1 else nothing
            writers.append((block.downsamplers[0].conv, taps, bias))
    for place, (conv, weight, bias) in enumerate(writers):
        add_noise(conv)
        outputs: Any = range(len(weight))
        if place == len(writers) - 1:  # in front of conv_norm_out
            outputs, weight = last.both(0, count), as_pairs(weight)
            bias = as_pairs(bias.expand(count))
        elif len(weight) > conv.out_channels:
            raise UsageError(
                f"model.block_out_channels: init: linear has {len(weight)} numbers to carry where {conv.out_channels} "
                "channels are; expected at least so many, or init: noise"
            )
        padded = torch.zeros(len(weight), conv.in_channels, *weight.shape[2:], dtype=torch.float64)
        padded[:, : weight.shape[1]] = weight
        set_rows(conv, outputs, padded, bias)

    # the head: constants from the last residual block on, the mean linear, the variance constant
    last.add_constants(encoder.mid_block.resnets[-1].conv2.bias)
    last.set_norm(encoder.conv_norm_out)
    add_noise(encoder.conv_out)
    set_rows(encoder.conv_out, range(count), last.read(0, count))
    logvar = range(count, encoder.conv_out.out_channels)  # none in a VQModel
    set_rows(encoder.conv_out, logvar, torch.zeros(len(logvar), last.width), LOGVAR)


# --- decoder ----------------------------------------------------------------------------------------------------------

SIDES = ((1, 2), (2, 1))  # taps of the neighbour to the right and of the one below
GATES = ((0,), (1,), (0, 1))  # open on even columns, on even rows, on both


@dataclass(frozen=True)
class Split:
    """A 2 x 2 block of next signals from one: base [k, n] for all pixels; forms [r, n] that pass gate `gates`[r], and
    what a form adds, out [k, r]."""

    base: torch.Tensor
    forms: torch.Tensor
    out: torch.Tensor
    gates: list[int]


def _split(outer: torch.Tensor, inner: torch.Tensor, side: int, most: int) -> Split:
    """The pixels' maps as base and gated forms, at most `most`: those that matter most for the picture."""
    weights = inner.square().sum(dim=0).sqrt()[:, None]  # a coordinate's size in the picture
    parts = weights * (inverse_map(inner) @ quarters(outer, side))  # [2, 2, k, n]: rows, columns
    # added by each gate to the form of the pixel in an odd row and an odd column, where all gates are shut
    apart = (
        parts[1, 0] - parts[1, 1],
        parts[0, 1] - parts[1, 1],
        parts[0, 0] - parts[0, 1] - parts[1, 0] + parts[1, 1],
    )
    found = []
    for gate, part in enumerate(apart):
        left, sizes, right = torch.linalg.svd(part, full_matrices=False)
        share = 0.5 ** len(GATES[gate])  # of the pixels at which it is open
        found += [(share * float(size) ** 2, gate, left[:, k] * size, right[k]) for k, size in enumerate(sizes)]
    found = sorted((one for one in found if one[0] > 1e-12), key=lambda one: -one[0])[:most]
    gates = [gate for _, gate, _, _ in found]
    out = torch.stack([one[2] for one in found], dim=1) if found else parts.new_zeros(len(weights), 0)
    forms = torch.stack([one[3] for one in found]) if found else parts.new_zeros(0, parts.shape[3])
    # what no gate gives is the mean over the four pixels
    opened = torch.tensor([[[float(not any((column, row)[side] for side in GATES[gate])) for gate in gates]
                            for column in (0, 1)] for row in (0, 1)], dtype=torch.float64)  # fmt: skip
    base = (parts - (out * opened[:, :, None]) @ forms).mean(dim=(0, 1))
    return Split(base / weights, forms, out / weights, gates)


def _start_decoder(decoder: Any, code: LinearCode, scale: torch.Tensor) -> None:
    norm_out = decoder.conv_norm_out
    groups, blocks = norm_out.num_groups, decoder.up_blocks
    widths = [Channels(block.resnets[-1].conv2.out_channels, groups) for block in blocks]
    levels = len(blocks) - 1
    if levels and len(blocks[0].resnets) < 2:
        raise UsageError("model.layers_per_block: init: linear needs at least 1, got 0")

    # how many signals each level may have, from the picture upwards: they stand beside two sums of differences and the
    # next level's signals
    room = [code.channels]
    for level in range(1, levels + 1):
        here, behind = widths[levels - level], widths[levels - level + 1]
        # no more than a patch has numbers, nor than four quarters of the level above can hold
        wanted = min(4**level * code.channels, 4 ** (levels - level) * code.latent_channels)
        check_room(behind, 3 + room[-1])
        check_room(here, 1)
        room.append(min(wanted, here.pairs, behind.pairs - 2 - room[-1]))

    # latents => signals of the highest level
    count = room[-1] if levels else code.latent_channels
    outer = (code.components * code.deviations)[:, :count]
    add_noise(decoder.conv_in)
    reader = torch.zeros(count, widths[0].width, dtype=torch.float64)
    # latents => coordinates of unit variance: the encoder's scale undone
    reader[range(count), range(count)] = 1 / scale[:count]
    set_rows(decoder.conv_in, range(code.latent_channels), torch.eye(code.latent_channels))
    if not levels:
        check_room(widths[0], code.channels)
        add_noise(decoder.conv_in)
        outer = outer / scale
        set_rows(decoder.conv_in, widths[0].both(0, code.channels), as_pairs(outer))
        reader = 0.5 * widths[0].read(0, code.channels)
        outer = torch.eye(code.channels, dtype=torch.float64)

    for step in range(1, levels + 1):
        level = levels - step + 1
        inner = inner_map(outer, 2**level, room[level - 1])
        here, behind, block = widths[step - 1], widths[step], blocks[step]
        split = _split(outer, inner, 2**level, behind.pairs)
        upsampler = blocks[step - 1].upsamplers[0].conv
        add_noise(upsampler)
        set_rows(upsampler, here.both(0, len(reader)), as_pairs(reader))
        reader = _depth_to_space(block, here, behind, split)
        outer = inner

    # the head
    last = blocks[-1].resnets[-1] if len(blocks[-1].resnets) else decoder.mid_block.resnets[-1]
    widths[-1].add_constants(last.conv2.bias)
    widths[-1].set_norm(norm_out)
    add_noise(decoder.conv_out)
    colour = code.mean.view(-1, code.channels).mean(dim=0)
    set_rows(decoder.conv_out, range(code.channels), outer @ (2 * reader), colour)  # behind the SiLU a pair reads twice


def _depth_to_space(block: Any, here: Channels, behind: Channels, split: Split) -> torch.Tensor:
    """The two residual blocks behind an upsampler => the rows that read the next signals from the tensor they leave."""
    count, forms = split.forms.shape[1], len(split.forms)
    differences, gate = block.resnets[:2]
    if (shortcut := differences.conv_shortcut) is not None:
        add_noise(shortcut)
        set_rows(shortcut, behind.both(0, count), as_pairs(0.5 * here.read(0, count)))

    # sums of absolute differences to the right and below: 0 on even columns, and on even rows. Only that matters, and
    # these norms may scale the differences by the picture's own
    compared = min(count, behind.pairs // 2)
    add_noise(differences.conv1)
    for side, (row, column) in enumerate(SIDES):
        taps = torch.zeros(2 * compared, here.width, 3, 3, dtype=torch.float64)
        taps[:, :, 1, 1] = as_pairs(here.read(0, compared))
        taps[:, :, row, column] = -taps[:, :, 1, 1]
        set_rows(differences.conv1, behind.both(side * compared, compared), taps)
    differences.norm2.weight.fill_(SLOPE)
    sums = torch.zeros(len(SIDES), behind.width, dtype=torch.float64)
    for side in range(len(SIDES)):
        sums[side, behind.both(side * compared, compared)] = TOGETHER / (SLOPE * compared)
    set_rows(differences.conv2, behind.both(count, len(SIDES)), as_pairs(sums))
    # the constants stand in the tensor between these two blocks alone: a convolution that read them would move its
    # output by K times what an optimiser's step moves a weight
    behind.add_constants(differences.conv2.bias)
    behind.add_constants(gate.conv2.bias, -1)

    # gates: `opened` is 1 at a sum of 0 and 0 from 1 on; a form x passes as silu(x - t) - silu(-x - t), where t is SHUT
    # for each side that is not open
    behind.set_norm(gate.norm1)
    minus = behind.both(count, len(SIDES))[len(SIDES) :]
    gate.norm1.weight[minus] *= OPEN
    gate.norm1.bias[minus] = OPEN
    opened = torch.zeros(len(SIDES), behind.width, dtype=torch.float64)
    opened[range(len(SIDES)), minus] = 1 / float(torch.nn.functional.silu(torch.tensor(OPEN, dtype=torch.float64)))
    add_noise(gate.conv1)
    asked = torch.zeros(forms, len(SIDES), dtype=torch.float64)  # of which sides each form's gate asks
    for form, one in enumerate(split.gates):
        asked[form, list(GATES[one])] = SHUT
    passing, taken, shut = split.forms @ behind.read(0, count), asked @ opened, asked.sum(dim=1)
    set_rows(
        gate.conv1, behind.both(0, forms), torch.cat([passing + taken, taken - passing]), torch.cat([-shut, -shut])
    )
    # both channels of a form fall by t: the constants of its group rise by it, and the group's mean stays 0
    for group in range(behind.groups):
        here_too = range(group, forms, behind.groups)
        set_rows(gate.conv1, behind.constants(group), -taken[here_too].sum(dim=0).expand(2, -1), shut[here_too].sum())
    behind.add_constants(gate.conv1.bias)
    behind.set_norm(gate.norm2, GATE)
    passed = behind.read(0, forms)
    set_rows(gate.conv2, behind.both(count + len(SIDES), len(split.out)), as_pairs(split.out @ passed / GATE))

    reader = split.base @ behind.read(0, count)
    return 0.5 * (reader + behind.read(count + len(SIDES), len(split.out)))
