"""The Triton kernels of group_norm.py, for activations that lie channels last. Imported by their first use alone.

A tile is some positions of one sample with all of its channels, so that reads are whole lines of memory. The positions
of a sample are cut into chunks, whose number depends on the shape of one sample alone: a value does not depend on what
else is in the batch. Each pass has one of two forms: sums by chunk and channel, which a program per group puts together
(no atomics: the same bits in every run), or one value from one value.

Legend: B batch, C channels, N positions (H * W), G groups, K = C / G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 4096  # values of a tile: 32 a thread at four warps
CHUNKS = 256  # at most, of a sample


class _Layout(NamedTuple):
    """Partition of x [B, C, H, W]: chunks of `rows` positions, tiles of `tile` positions and `width` channels."""

    chunks: int
    rows: int
    tile: int
    width: int


def _layout(x: torch.Tensor) -> _Layout:
    positions = x.shape[2] * x.shape[3]
    width = triton.next_power_of_2(x.shape[1])
    tile = max(1, TILE // width)
    rows = triton.cdiv(triton.cdiv(positions, CHUNKS), tile) * tile
    return _Layout(triton.cdiv(positions, rows), rows, tile, width)


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, C, H, W] => (silu(group_norm(x)) in its dtype, mean [B, G], rstd [B, G])."""
    x = _last(x)
    batch, channels = x.shape[:2]
    positions, cut = x.shape[2] * x.shape[3], _layout(x)
    grid = (cut.chunks, batch)
    partial = x.new_empty((2, batch, cut.chunks, channels), dtype=torch.float32)
    mean, rstd = x.new_empty((2, batch, groups), dtype=torch.float32)
    y = torch.empty_like(x)
    _moments[grid](x, partial[0], partial[1], positions, channels, cut.rows, cut.tile, cut.width)
    _statistics[(groups, batch)](
        partial[0], partial[1], mean, rstd, positions, channels, cut.rows, cut.chunks, eps,
        channels // groups, triton.next_power_of_2(cut.chunks), triton.next_power_of_2(channels // groups),
    )  # fmt: skip
    _apply[grid](x, y, weight, bias, mean, rstd, positions, channels, cut.rows, groups, cut.tile, cut.width)
    return y, mean, rstd


@triton.jit
def _moments(x, means, squares, positions, channels, rows, tile: tl.constexpr, width: tl.constexpr):
    """Mean and sum of squared deviations of each channel in a chunk [B, chunks, C] (Chan et al. 1983, eq. 2.1)."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, width)
    first = chunk * rows
    start = x + (sample.to(tl.int64) * positions + first) * channels
    count = 0.0
    mean = tl.zeros([width], tl.float32)
    square = tl.zeros([width], tl.float32)
    for row in range(0, rows, tile):
        place = row + tl.arange(0, tile)
        valid = (first + place < positions)[:, None] & (channel < channels)[None, :]
        values = tl.load(start + place[:, None] * channels + channel[None, :], valid, 0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(positions - first - row, 0), tile).to(tl.float32)
        local = tl.sum(values, 0) / tl.maximum(here, 1.0)
        apart = tl.where(valid, values - local[None, :], 0.0)
        total = tl.maximum(count + here, 1.0)
        step = local - mean
        square += tl.sum(apart * apart, 0) + step * step * (count * here / total)
        mean += step * (here / total)
        count += here
    target = (sample * tl.num_programs(0) + chunk) * channels + channel
    tl.store(means + target, mean, channel < channels)
    tl.store(squares + target, square, channel < channels)


@triton.jit
def _statistics(
    means, squares, mean, rstd, positions, channels, rows, chunks, eps,
    members: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of a group [B, G] from its channels' in each chunk."""
    group, sample = tl.program_id(0), tl.program_id(1)
    chunk, member = tl.arange(0, height), tl.arange(0, width)
    valid = (chunk < chunks)[:, None] & (member < members)[None, :]
    source = (sample * chunks + chunk)[:, None] * channels + (group * members + member)[None, :]
    count = tl.minimum(rows, positions - chunk * rows).to(tl.float32)[:, None]
    local = tl.load(means + source, valid, 0.0)
    size = 1.0 * positions * members
    centre = tl.sum(tl.sum(tl.where(valid, local * count, 0.0), 1), 0) / size
    apart = tl.where(valid, local - centre, 0.0)
    spread = tl.load(squares + source, valid, 0.0) + apart * apart * count
    variance = tl.sum(tl.sum(spread, 1), 0) / size
    target = sample * tl.num_programs(0) + group
    tl.store(mean + target, centre)
    tl.store(rstd + target, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _apply(x, y, weight, bias, mean, rstd, positions, channels, rows, groups, tile: tl.constexpr, width: tl.constexpr):
    chunk, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, width)
    inside = channel < channels
    group = sample * groups + channel // (channels // groups)
    centre = tl.load(mean + group, inside, 0.0)
    scale = tl.load(rstd + group, inside, 0.0) * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    first = chunk * rows
    start = (sample.to(tl.int64) * positions + first) * channels
    for row in range(0, rows, tile):
        place = row + tl.arange(0, tile)
        valid = (first + place < positions)[:, None] & inside[None, :]
        offset = place[:, None] * channels + channel[None, :]
        values = tl.load(x + start + offset, valid, 0.0).to(tl.float32)
        normed = (values - centre[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + start + offset, (normed * tl.sigmoid(normed)).to(y.dtype.element_ty), valid)


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x [B, C, H, W], weight [C], bias [C]) from that of y."""
    x, grad = _last(x), _last(grad)
    batch, channels = x.shape[:2]
    positions, cut = x.shape[2] * x.shape[3], _layout(x)
    grid, members = (cut.chunks, batch), channels // groups
    partial = x.new_empty((2, batch, cut.chunks, channels), dtype=torch.float32)
    sums = x.new_empty((2, batch, channels), dtype=torch.float32)
    means = x.new_empty((2, batch, groups), dtype=torch.float32)
    dx = torch.empty_like(x)
    shape = (positions, channels, cut.rows, groups, cut.tile, cut.width)
    _gradient_sums[grid](x, grad, weight, bias, mean, rstd, partial[0], partial[1], *shape)
    _gradient_means[(groups, batch)](
        partial[0], partial[1], weight, sums[0], sums[1], means[0], means[1], positions, channels, cut.chunks,
        members, triton.next_power_of_2(cut.chunks), triton.next_power_of_2(members),
    )  # fmt: skip
    _gradient[grid](x, grad, weight, bias, mean, rstd, means[0], means[1], dx, *shape)
    dbias, dweight = sums.sum(dim=1)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


@triton.jit
def _through_silu(grad, normed):
    gate = tl.sigmoid(normed)
    return grad * gate * (1.0 + normed * (1.0 - gate))


@triton.jit
def _gradient_sums(
    x, grad, weight, bias, mean, rstd, plain, scaled, positions, channels, rows, groups,
    tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk [B, chunks, C] of d, the gradient behind the norm, and of d * (x - mean) * rstd."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, width)
    inside = channel < channels
    group = sample * groups + channel // (channels // groups)
    centre, inverse = tl.load(mean + group, inside, 0.0), tl.load(rstd + group, inside, 0.0)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    first = chunk * rows
    start = (sample.to(tl.int64) * positions + first) * channels
    sum_plain = tl.zeros([width], tl.float32)
    sum_scaled = tl.zeros([width], tl.float32)
    for row in range(0, rows, tile):
        place = row + tl.arange(0, tile)
        valid = (first + place < positions)[:, None] & inside[None, :]
        offset = place[:, None] * channels + channel[None, :]
        unit = (tl.load(x + start + offset, valid, 0.0).to(tl.float32) - centre[None, :]) * inverse[None, :]
        above = tl.load(grad + start + offset, valid, 0.0).to(tl.float32)  # 0 where there is no value
        inner = _through_silu(above, unit * scale[None, :] + shift[None, :])
        sum_plain += tl.sum(inner, 0)
        sum_scaled += tl.sum(inner * unit, 0)
    target = (sample * tl.num_programs(0) + chunk) * channels + channel
    tl.store(plain + target, sum_plain, inside)
    tl.store(scaled + target, sum_scaled, inside)


@triton.jit
def _gradient_means(
    plain, scaled, weight, sum_plain, sum_scaled, mean_plain, mean_scaled, positions, channels, chunks,
    members: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """The same sums over a sample [B, C], and over a group times the weight, divided by its size [B, G]."""
    group, sample = tl.program_id(0), tl.program_id(1)
    chunk, member = tl.arange(0, height), tl.arange(0, width)
    inside = member < members
    valid = (chunk < chunks)[:, None] & inside[None, :]
    channel = group * members + member
    source = (sample * chunks + chunk)[:, None] * channels + channel[None, :]
    total_plain = tl.sum(tl.load(plain + source, valid, 0.0), 0)
    total_scaled = tl.sum(tl.load(scaled + source, valid, 0.0), 0)
    tl.store(sum_plain + sample * channels + channel, total_plain, inside)
    tl.store(sum_scaled + sample * channels + channel, total_scaled, inside)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    size = 1.0 * positions * members
    target = sample * tl.num_programs(0) + group
    tl.store(mean_plain + target, tl.sum(total_plain * scale, 0) / size)
    tl.store(mean_scaled + target, tl.sum(total_scaled * scale, 0) / size)


@triton.jit
def _gradient(
    x, grad, weight, bias, mean, rstd, mean_plain, mean_scaled, dx, positions, channels, rows, groups,
    tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (d * weight - mean of (d * weight) - unit * mean of (d * weight * unit)), means over a group."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, width)
    inside = channel < channels
    group = sample * groups + channel // (channels // groups)
    centre, inverse = tl.load(mean + group, inside, 0.0), tl.load(rstd + group, inside, 0.0)
    offset_mean, slope = tl.load(mean_plain + group, inside, 0.0), tl.load(mean_scaled + group, inside, 0.0)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    first = chunk * rows
    start = (sample.to(tl.int64) * positions + first) * channels
    for row in range(0, rows, tile):
        place = row + tl.arange(0, tile)
        valid = (first + place < positions)[:, None] & inside[None, :]
        offset = place[:, None] * channels + channel[None, :]
        unit = (tl.load(x + start + offset, valid, 0.0).to(tl.float32) - centre[None, :]) * inverse[None, :]
        above = tl.load(grad + start + offset, valid, 0.0).to(tl.float32)
        inner = _through_silu(above, unit * scale[None, :] + shift[None, :]) * scale[None, :]
        found = (inner - offset_mean[None, :] - unit * slope[None, :]) * inverse[None, :]
        tl.store(dx + start + offset, found.to(dx.dtype.element_ty), valid)
