"""Scalable tensors of encoders and decoders as AutoencoderKL has them: what a constant may multiply unseen.

GroupNorm takes the scale out of its input. So whatever only GroupNorms and linear maps read may be scaled, as long as
the linear maps that read it take the inverse:

- a *stretch* of the residual stream, from the convolution that begins it (conv_in, a sampler, a shortcut) to the next:
  written by that convolution, by the second convolution of each block and by the attention's output;
- a *branch*: the first convolution of a block, read by nothing but the second GroupNorm of that block;
- a *chain* of two linear maps (conv_out and quant_conv, post_quant_conv and conv_in, to_v and to_out).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder

from ldm_vae.autoencoder.families import is_movq
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an


@dataclass
class Stretch:
    """start: the convolution that begins it; before: the stretch that one reads (None: not a stretch)."""

    start: str
    before: Stretch | None
    writers: list[str] = field(default_factory=list)
    """Layers whose output is added to it."""
    sums: list[str] = field(default_factory=list)
    """Modules whose output is the stream itself."""
    norms: list[str] = field(default_factory=list)
    """GroupNorms that read it."""

    @property
    def sites(self) -> list[str]:
        """Modules whose outputs scale with it."""
        return [self.start, *self.writers, *self.sums]


@dataclass(frozen=True)
class Branch:
    """A convolution that is read by one GroupNorm only."""

    convolution: str
    norm: str


@dataclass(frozen=True)
class Chain:
    """Two linear maps, the second reading nothing but the first."""

    first: str
    second: str

    @property
    def name(self) -> str:
        """Name of its factor: a stretch may begin at the same layer."""
        return f"{self.first} -> {self.second}"


@dataclass(frozen=True)
class Structure:
    """All that may be scaled in one network."""

    stretches: list[Stretch]
    branches: list[Branch]
    chains: list[Chain]


def is_scalable(vae: Any) -> bool:
    """True where encoder and decoder are those of AutoencoderKL: of AutoencoderKLFlux2 too, and of a VQModel."""
    sides = (getattr(vae, "encoder", None), getattr(vae, "decoder", None))
    return isinstance(sides[0], Encoder) and isinstance(sides[1], Decoder) and not is_movq(vae)


def structure_of(vae: Any) -> Structure:
    """The stretches, branches and chains of a network, encoder first.

    Raises:
        UsageError: it is not built as AutoencoderKL is.
    """
    if not is_scalable(vae):
        raise UsageError(
            f"fp16 fix: expected the encoder and decoder of an AutoencoderKL, got those of {an(type(vae).__name__)}; "
            "`fp16 audit` takes it, and bf16 has fp32's range"
        )
    found = Structure([], [], [])
    if vae.quant_conv is not None:
        found.chains.append(Chain("encoder.conv_out", "quant_conv"))
    if vae.post_quant_conv is not None:
        found.chains.append(Chain("post_quant_conv", "decoder.conv_in"))
    for side in ("encoder", "decoder"):
        stretch = Stretch(f"{side}.conv_in", None)
        found.stretches.append(stretch)
        for name, module in _in_order(side, getattr(vae, side)):
            stretch = _follow(found, stretch, name, module)
        stretch.norms.append(f"{side}.conv_norm_out")
    return found


def _in_order(side: str, network: Any) -> Iterator[tuple[str, Any]]:
    """The stream's modules as it runs through them: residual blocks, attentions, samplers' convolutions."""
    middle = list(_block(f"{side}.mid_block", network.mid_block))
    if side == "decoder":
        yield from middle
    kind = "down_blocks" if side == "encoder" else "up_blocks"
    for index, block in enumerate(getattr(network, kind)):
        yield from _block(f"{side}.{kind}.{index}", block)
        for what in ("downsamplers", "upsamplers"):
            for nth, sampler in enumerate(getattr(block, what, None) or ()):
                yield f"{side}.{kind}.{index}.{what}.{nth}.conv", sampler.conv
    if side == "encoder":
        yield from middle


def _block(name: str, block: Any) -> Iterator[tuple[str, Any]]:
    attentions = list(getattr(block, "attentions", None) or ())
    for index, resnet in enumerate(block.resnets):
        yield f"{name}.resnets.{index}", resnet
        if index < len(attentions) and attentions[index] is not None:
            yield f"{name}.attentions.{index}", attentions[index]


def _follow(found: Structure, stretch: Stretch, name: str, module: Any) -> Stretch:
    """Enter one module; returns the stretch behind it."""
    if hasattr(module, "conv2"):  # a residual block
        stretch.norms.append(f"{name}.norm1")
        found.branches.append(Branch(f"{name}.conv1", f"{name}.norm2"))
        if module.conv_shortcut is not None:
            stretch = _begin(found, f"{name}.conv_shortcut", stretch)
        stretch.writers.append(f"{name}.conv2")
        stretch.sums.append(name)
    elif hasattr(module, "to_v"):
        stretch.norms.append(f"{name}.group_norm")
        found.chains.append(Chain(f"{name}.to_v", f"{name}.to_out.0"))
        stretch.writers.append(f"{name}.to_out.0")
        stretch.sums.append(name)
    else:
        stretch = _begin(found, name, stretch)
    return stretch


def _begin(found: Structure, start: str, before: Stretch) -> Stretch:
    stretch = Stretch(start, before)
    found.stretches.append(stretch)
    return stretch
