"""Decoder of `init: linear` (`linear_init.py`, which says how): latents => pixels, depth to space by gates.

Legend: n signals, C image channels, c latent channels.
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
    gains_of,
    groups_of,
    halves,
    inner_map,
    inverse_map,
    quarters,
    set_rows,
)
from ldm_vae.autoencoder.linear_parts import Level, Side, shortcut_of
from ldm_vae.core.errors import UsageError

SLOPE = 4.0  # silu(SLOPE d) + silu(-SLOPE d) is SLOPE |d|, rounded off below d = 1 / SLOPE
TOGETHER = 1.0  # what the absolute differences of all signals add up to where each is of its root mean square
OPEN = 8.0  # a gate is open at differences of 0 and shut from 1 on; silu(-OPEN) = 0.3 % of it leaks
SHUT = 8.0  # what a shut gate takes off a signal of unit variance
GATE = 2.0  # sharpness of the gates
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


def _split(parts: torch.Tensor, inner: torch.Tensor, most: int) -> Split:
    """The pixels' maps `parts` [2, 2, P, n] as base and gated forms of `inner` coordinates, at most `most`: those that
    matter most for the picture."""
    weights = inner.square().sum(dim=0).sqrt()[:, None]  # a coordinate's size in the picture
    parts = weights * (inverse_map(inner) @ parts)  # [2, 2, k, n]: rows, columns
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


def _rooms(blocks: list[Level], widths: list[Channels], code: LinearCode) -> tuple[list[int], list[int]]:
    """Numbers of signals of each level, from the picture upwards, of the frames that it joins and of each of them:
    they stand beside two sums of differences and the next level's signals."""
    levels, frames = len(blocks) - 1, 1
    joined, single = [code.channels], [0]
    rest = code.frames * code.latent_channels
    for level in range(1, levels + 1):
        block, here, behind = blocks[levels - level], widths[levels - level], widths[levels - level + 1]
        sampled = Channels(block.sampler.out_channels, here.groups)
        check_room(behind, 3 + joined[-1])
        check_room(sampled, 1)
        # no more than a patch has numbers, nor than four quarters of the level above can hold
        wanted = min(4**level * code.channels * frames, 4 ** (levels - level) * rest // frames)
        single.append(min(wanted, sampled.pairs, behind.pairs - 2 - joined[-1]))
        if block.time is None:
            joined.append(single[-1])
        else:
            frames *= 2
            # w leaves room for the v of the level above, in the block that it comes from
            joined.append(min(2 * single[-1], max(1, (here.pairs - 2) // 2)))
    return joined, single


def start_decoder(decoder: Side, code: LinearCode, scale: torch.Tensor) -> None:
    blocks, groups = decoder.levels, groups_of(decoder.norm_out)
    widths = [Channels(block.resnets[-1].conv2.out_channels, groups) for block in blocks]
    levels = len(blocks) - 1
    if levels and len(blocks[0].resnets) < 2:
        raise UsageError("model.layers_per_block: init: linear needs at least 1, got 0")
    joined, single = _rooms(blocks, widths, code)

    # latents => signals of the highest level
    count = joined[-1] if levels and blocks[0].time is None else code.latent_channels
    outer, frames = (code.components * code.deviations)[:, :count], code.frames
    add_noise(decoder.conv_in)
    reader = torch.zeros(count, widths[0].width, dtype=torch.float64)
    # latents => coordinates of unit variance: the encoder's scale undone
    reader[range(count), range(count)] = 1 / scale[:count]
    spare = torch.eye(widths[0].width, dtype=torch.float64)[code.latent_channels :]
    set_rows(decoder.conv_in, range(code.latent_channels), torch.eye(code.latent_channels))
    if not levels:
        check_room(widths[0], code.channels)
        add_noise(decoder.conv_in)
        outer = outer / scale
        set_rows(decoder.conv_in, widths[0].both(0, code.channels), as_pairs(outer))
        reader = 0.5 * widths[0].read(0, code.channels)
        outer = torch.eye(code.channels, dtype=torch.float64)

    for step in range(1, levels + 1):
        level, block = levels - step + 1, blocks[step - 1]
        if block.time is not None:
            both, frames = halves(outer), frames // 2
            outer = inner_map(both, min(single[level], len(spare)))
            reader = _two_of_one(block.time, reader, spare[: outer.shape[1]], inverse_map(outer) @ both)
        parts = quarters(outer, 2**level, frames)
        inner = inner_map(parts, joined[level - 1])
        here, behind = Channels(block.sampler.out_channels, groups), widths[step]
        split = _split(parts, inner, behind.pairs)
        add_noise(block.sampler)
        set_rows(block.sampler, here.both(0, len(reader)), as_pairs(reader))
        reader = _depth_to_space(blocks[step], here, behind, split)
        # signals are pairs, so what is alike in both channels of one is 0
        spare = 0.5 * behind.read(0, behind.pairs).abs()
        outer = inner

    # the head
    widths[-1].add_constants(decoder.last_resnet.conv2.bias)
    widths[-1].set_norm(decoder.norm_out)
    add_noise(decoder.conv_out)
    colour = code.mean.view(-1, code.channels).mean(dim=0)
    set_rows(decoder.conv_out, range(code.channels), outer @ (2 * reader), colour)  # behind the SiLU a pair reads twice


def _two_of_one(time: Any, reader: torch.Tensor, spare: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
    """A convolution that makes two frames of one: signals w, which `reader` reads, become ways[0] w and ways[1] w =>
    the rows that read them, from the first frame too, which does not pass it; spare: rows that read 0 there."""
    add_noise(time)
    write = inverse_map(spare.T).T
    time.weight[:, :, -1, 0, 0] = torch.cat([write @ way @ reader for way in ways]).to(time.weight)
    return ways.mean(dim=0) @ reader + spare


def _depth_to_space(block: Level, here: Channels, behind: Channels, split: Split) -> torch.Tensor:
    """The two residual blocks behind an upsampler => the rows that read the next signals from the tensor they leave."""
    count, forms = split.forms.shape[1], len(split.forms)
    differences, gate = block.resnets[:2]
    if (shortcut := shortcut_of(differences)) is not None:
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
    gains_of(differences.norm2).fill_(SLOPE)
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
    sides = behind.both(count, len(SIDES))
    plus, minus = sides[: len(SIDES)], sides[len(SIDES) :]
    # 1 - the sum, by the tensor and not by the norm, as an RMS norm has no bias
    for conv, one in ((differences.conv2, 1), (gate.conv2, -1)):
        conv.bias[minus] += one
        conv.bias[plus] -= one
    gains_of(gate.norm1)[minus] *= OPEN
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
