"""GroupNorm and the SiLU behind it as one operation, for the residual blocks of diffusers' autoencoders.

Under autocast torch computes a group norm in fp32 and, where activations lie channels last, copies them to the other
layout and back: 32 bytes of memory traffic a bf16 value forward. The operation here reads the value twice and writes it
once (6 bytes) in the layout that it has; statistics and arithmetic are fp32 as before, so the result is that of the two
modules to the rounding of fp32. Backward it keeps the input alone and computes the rest again.

On CUDA the operation is a Triton kernel (group_norm_triton.py, imported at its first use), elsewhere torch's own.

Legend: B batch, C channels, H W positions, G groups.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldm_vae.autoencoder.latents import at_least_fp32

# --- the operation ----------------------------------------------------------------------------------------------------


def group_norm_silu(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """silu(group_norm(x)) of x [B, C, H, W], in its dtype; weight and bias [C] may have another one."""
    if torch.compiler.is_compiling():  # the compiler fuses them itself, with what stands around them
        return F.silu(F.group_norm(x, groups, weight, bias, eps)).to(x.dtype)
    y: torch.Tensor = torch.ops.ldm_vae.group_norm_silu(x, weight, bias, groups, eps)[0]
    return y


# as operators, so that counting, profiling and tensors without content see what they cost
_library = torch.library.Library("ldm_vae", "DEF")
_library.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups)"
    " -> (Tensor, Tensor, Tensor)"
)

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> Three:
    """(y, mean [B, G], rstd [B, G])."""
    wide = _laid_out(at_least_fp32(x), x)
    shape = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    normed, mean, rstd = torch.native_group_norm(wide, weight.to(wide), bias.to(wide), *shape, groups, eps)
    return F.silu(normed).to(x.dtype), mean, rstd


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
) -> Three:
    """Gradients of (x, weight, bias)."""
    wide = _laid_out(at_least_fp32(x), x)
    batch, channels, *sides = x.shape
    per_channel = (batch, channels, 1, 1)
    scale = rstd.repeat_interleave(channels // groups, 1).view(per_channel) * weight.to(wide).view(1, -1, 1, 1)
    shift = mean.repeat_interleave(channels // groups, 1).view(per_channel)
    normed = (wide - shift) * scale + bias.to(wide).view(1, -1, 1, 1)
    inner = _laid_out(torch.ops.aten.silu_backward(grad.to(wide), normed), x)
    found = torch.ops.aten.native_group_norm_backward(
        inner, wide, mean, rstd, weight.to(wide), batch, channels, sides[0] * sides[1], groups, [True, True, True]
    )
    return found[0].to(x.dtype), found[1].to(weight.dtype), found[2].to(bias.dtype)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Without gaps, and on a CPU channels last if `like` is: torch's formulas take it for granted that all have one
    layout, and tell it by every stride, that of a batch of 1 too, which may be anything."""
    last = like.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    strides = torch.empty(tensor.shape, device="meta", memory_format=layout).stride()
    return tensor.contiguous(memory_format=layout).as_strided(tensor.shape, strides)


def _kernel(x: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, unless it is not installed or computes in less than x does."""
    if x.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    from ldm_vae.kernels import group_norm_triton

    return group_norm_triton


def _forward_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> Three:
    kernel = _kernel(x)
    return (_forward if kernel is None else kernel.forward)(x, weight, bias, groups, eps)


def _backward_cuda(grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> Three:
    kernel = _kernel(x)
    return (_backward if kernel is None else kernel.backward)(grad, x, *rest)


for _name, _plain, _cuda in (
    ("group_norm_silu", _forward, _forward_cuda),
    ("group_norm_silu_backward", _backward, _backward_cuda),
):
    _library.impl(_name, _plain, "CompositeExplicitAutograd")
    _library.impl(_name, _cuda, "CUDA")


@torch.library.register_fake("ldm_vae::group_norm_silu", lib=_library)
def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> Three:
    statistics = [at_least_fp32(x.new_empty(x.shape[0], groups)) for _ in range(2)]
    return torch.empty_like(x), statistics[0], statistics[1]


@torch.library.register_fake("ldm_vae::group_norm_silu_backward", lib=_library)
def _backward_fake(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *_rest: Any) -> Three:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, weight, bias, ctx.groups, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    found = torch.ops.ldm_vae.group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.groups)
    return (*found, None, None)


torch.library.register_autograd("ldm_vae::group_norm_silu", _gradients, setup_context=_keep, lib=_library)


# --- in a network -----------------------------------------------------------------------------------------------------


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm with the SiLU behind it; the parameters are the norm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """The block without time embedding: norms with their SiLU, no division by a scale of 1, no copy to another
    layout before the shortcut."""

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        hidden: torch.Tensor = self.conv1(self.norm1(x))
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        shortcut: torch.Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


def fuse_norms(network: nn.Module) -> int:
    """Put the operation into a diffusers network, in place: how many norms took it.

    Parameters, their names and what is exported stay as they are: modules change their class, not their content, and
    nothing is added. A block of another form (time embedding, another activation) stays diffusers'.
    """
    before = sum(isinstance(module, FusedGroupNorm) for module in network.modules())
    for module in list(network.modules()):
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.norm1.__class__ = module.norm2.__class__ = FusedGroupNorm
            module.__class__ = FusedResnetBlock
        elif isinstance(getattr(module, "conv_act", None), nn.SiLU) and _is_affine(module.conv_norm_out):
            module.conv_norm_out.__class__ = FusedGroupNorm  # the end of an encoder or a decoder
            module.conv_act = nn.Identity()
    return sum(isinstance(module, FusedGroupNorm) for module in network.modules()) - before


def _is_plain(block: Any) -> bool:
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and _is_affine(block.norm1)
        and _is_affine(block.norm2)
        and block.time_emb_proj is block.upsample is block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1
    )


def _is_affine(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine
