"""Linear maps in diffusers' layers: signals that pass a norm and a SiLU unchanged, for `linear_init.py`.

The norm is a GroupNorm, or Wan's RMS norm, which is one of one group where the mean is 0. A layer of clips sees the
present frame with its last tap in time.

Legend: P numbers of a patch, n signals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm_vae.core.errors import UsageError

CONSTANT = 64.0  # K / sqrt(m); signals are of size 1, gates' of size SHUT: a group's scale moves by less than 1 %
NOISE = 1e-4  # of weights that carry no signal, so that all can learn
STD = CONSTANT * math.sqrt(2)  # of a group with two channels of +K and -K among m


@dataclass(frozen=True)
class Channels:
    """Layout of signals in a tensor that a GroupNorm and a SiLU follow: signal k as the pair plus[k], minus[k], the
    signals dealt out over the groups, and two constants at the end of each group."""

    width: int
    groups: int

    @property
    def size(self) -> int:
        return self.width // self.groups

    @property
    def pairs(self) -> int:
        """Number of signals that there is room for."""
        return self.groups * max(0, (self.size - 2) // 2)

    @property
    def constant(self) -> float:
        """K, which gives all groups one standard deviation, STD."""
        return CONSTANT * math.sqrt(self.size)

    def plus(self, signal: int) -> int:
        place, group = divmod(signal, self.groups)
        return group * self.size + 2 * place

    def both(self, first: int, count: int) -> list[int]:
        """The channels of signals first ... first + count - 1: all plus, then all minus."""
        plus = [self.plus(signal) for signal in range(first, first + count)]
        return plus + [channel + 1 for channel in plus]

    def read(self, first: int, count: int) -> torch.Tensor:
        """[count, width]: plus minus minus, which is the signal behind the SiLU and twice the signal before it."""
        rows = torch.zeros(count, self.width, dtype=torch.float64)
        channels = self.both(first, count)
        rows[range(count), channels[:count]] = 1
        rows[range(count), channels[count:]] = -1
        return rows

    def constants(self, group: int) -> list[int]:
        """The channels of its +K and -K."""
        return [(group + 1) * self.size - 2, (group + 1) * self.size - 1]

    def add_constants(self, bias: torch.Tensor, sign: int = 1) -> None:
        bias.view(self.groups, self.size)[:, -2:] += sign * self.constant * torch.tensor([1.0, -1.0])

    def set_norm(self, norm: Any, gain: float = 1.0) -> None:
        """Let signals pass times `gain`; the constants come out as +1 and -1, which a weight reads like a bias."""
        weight = gains_of(norm)
        weight.fill_(STD * gain)
        weight.view(self.groups, self.size)[:, -2:] = STD / self.constant
        if isinstance(norm, nn.GroupNorm):
            norm.bias.zero_()


@torch.no_grad()
def clear_residuals(network: nn.Module) -> None:
    """Make every residual block its shortcut, in place."""
    for module in network.modules():
        if hasattr(module, "conv_shortcut"):
            clear(module.conv2)


@torch.no_grad()
def clear_attention(network: nn.Module) -> None:
    """Make every attention its shortcut, in place."""
    module: Any
    for module in network.modules():
        if hasattr(module, "to_out"):
            clear(module.to_out[0])
        elif hasattr(module, "to_qkv"):
            clear(module.proj)


def clear(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def gains_of(norm: Any) -> Any:
    """The affine weight [channels] of a norm, in place."""
    return norm.weight if isinstance(norm, nn.GroupNorm) else norm.gamma.data.view(-1)


def groups_of(norm: Any) -> int:
    """1 of an RMS norm."""
    return getattr(norm, "num_groups", 1)


def add_noise(conv: Any) -> None:
    nn.init.normal_(conv.weight, std=NOISE)
    nn.init.zeros_(conv.bias)


def set_rows(conv: Any, outputs: Any, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """Rows of a convolution: weight [outputs, in] at the middle tap, or [outputs, in, rows, columns] from the first."""
    outputs = list(outputs)
    conv.weight[outputs] = 0
    now = conv.weight if conv.weight.ndim == 4 else conv.weight[:, :, -1]
    middle = now.shape[-1] // 2
    taps = weight[:, :, None, None] if weight.ndim == 2 else weight
    first = middle if weight.ndim == 2 else 0
    rows = torch.zeros_like(now[outputs])
    rows[:, :, first : first + taps.shape[2], first : first + taps.shape[3]] = taps.to(rows)
    now[outputs] = rows
    conv.bias[outputs] = torch.as_tensor(bias).to(conv.bias)


def as_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows that write signals => rows that write their pairs."""
    return torch.cat([rows, -rows])


def check_room(channels: Channels, needed: int) -> None:
    """Raises UsageError where `needed` signals do not fit."""
    if channels.pairs < needed:
        raise UsageError(
            f"init: linear needs room for {needed} signals in {channels.width} of model.block_out_channels, each two "
            f"channels beside two constants in each of model.norm_num_groups {channels.groups}; there is room for "
            f"{channels.pairs}: fewer groups, a larger width or init: noise would do"
        )


def quarters(rows: torch.Tensor, side: int, frames: int = 1) -> torch.Tensor:
    """Maps [P, n] to patches of `side` => to their quarters [2, 2, P / 4, n]."""
    half = side // 2
    return rows.reshape(frames, 2, half, 2, half, -1, rows.shape[1]).permute(1, 3, 0, 2, 4, 5, 6).flatten(2, 5)


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Maps [P, n] to patches of several frames => to their earlier and later frames [2, P / 2, n]."""
    return rows.view(2, -1, rows.shape[1])


def inner_map(parts: torch.Tensor, most: int | None = None) -> torch.Tensor:
    """Maps [..., P, n] of coordinates of unit variance to the parts of their patches => the same map [P, k] for one
    part: its principal components, at most `most`, each times its standard deviation."""
    parts = parts.reshape(-1, *parts.shape[-2:])
    variances, vectors = torch.linalg.eigh((parts @ parts.mT).mean(dim=0))
    # directions without variance carry nothing, and dividing by their deviation would blow rounding up
    rank = int((variances > 1e-12 * variances[-1]).sum())
    kept = min(rank, most or rank)
    # eigh sorts ascending: the largest components are the last columns
    found: torch.Tensor = (vectors[:, -kept:] * variances[-kept:].sqrt()).flip(1)
    return found


def inverse_map(maps: torch.Tensor) -> torch.Tensor:
    """Inverse of a map with orthogonal columns [P, n] => [n, P]."""
    inverse: torch.Tensor = (maps / maps.square().sum(dim=0)).T
    return inverse
