"""Parts of an autoencoder in one vocabulary, for `linear_init.py`: AutoencoderKL's and VQModel's, and Wan's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Level:
    """Layers of one resolution: residual blocks; sampler, the strided convolution behind them or the one behind nearest
    upsampling; time, the convolution that makes one frame of two behind it, or two of one before it."""

    resnets: list[Any] = field(default_factory=list)
    sampler: Any = None
    time: Any = None


@dataclass(frozen=True)
class Side:
    """An encoder or a decoder: its levels in the order of its forward, the last norm and the last residual block before
    the levels (decoder) or behind them (encoder)."""

    conv_in: Any
    levels: list[Level]
    middle: Any
    norm_out: Any
    conv_out: Any

    @property
    def last_resnet(self) -> Any:
        """The residual block before the head of a decoder."""
        return (self.levels[-1].resnets or [self.middle])[-1]


def side_of(network: Any) -> Side:
    """The parts of an encoder or a decoder."""
    norm = network.conv_norm_out if hasattr(network, "conv_norm_out") else network.norm_out
    blocks = network.down_blocks if hasattr(network, "down_blocks") else network.up_blocks
    return Side(network.conv_in, _levels(blocks), network.mid_block.resnets[-1], norm, network.conv_out)


def _levels(blocks: Any) -> list[Level]:
    if all(hasattr(block, "resnets") for block in blocks):
        samplers = [(getattr(b, "downsamplers", None) or getattr(b, "upsamplers", None) or [None])[0] for b in blocks]
        return [_level(list(block.resnets), sampler) for block, sampler in zip(blocks, samplers, strict=True)]
    found, resnets = [], []  # Wan's encoder has one list of all layers
    for layer in blocks:
        if hasattr(layer, "conv_shortcut"):
            resnets.append(layer)
        elif hasattr(layer, "resample"):
            found.append(_level(resnets, layer))
            resnets = []
    return [*found, _level(resnets, None)]


def _level(resnets: list[Any], sampler: Any) -> Level:
    if sampler is None:
        return Level(resnets)
    conv = sampler.conv if hasattr(sampler, "conv") else sampler.resample[1]
    return Level(resnets, conv, getattr(sampler, "time_conv", None))


def shortcut_of(resnet: Any) -> Any:
    """The convolution that a residual block's shortcut goes through, or None."""
    return None if isinstance(resnet.conv_shortcut, nn.Identity) else resnet.conv_shortcut
