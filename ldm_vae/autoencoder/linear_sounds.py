"""`init: linear` of sounds: an AutoencoderOobleck or CausalOobleck whose first forward is the linear code of hops.

A snake is no obstacle: x + sin^2(a x) / b is x and an even function, so a signal s that passes as the pair +s, -s comes
out as their difference, 2 s, exactly. A strided convolution sees its hop whole and a transposed one writes it whole, so
neither needs more than its weights. As of images (`linear_init.py`), a level holds its patches as coordinates of unit
variance in the components of the code's own sub-patches; where a width has too few channels for the pairs, the smallest
are left out.

Legend: C channels of a sound, P numbers of a patch (samples first, channels last), n signals, s stride.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckResidualUnit
from torch import nn

from ldm_vae.autoencoder.causal_oobleck import CausalOobleck, Residual
from ldm_vae.autoencoder.linear_code import LinearCode
from ldm_vae.autoencoder.linear_init import sized
from ldm_vae.autoencoder.linear_layers import NOISE, as_pairs, inner_map, inverse_map
from ldm_vae.core.errors import UsageError

SCALE = -3.5  # of the posterior: softplus gives noise of 3 % of a latent's standard deviation


@torch.no_grad()
def start_sounds(vae: Any, code: LinearCode, scale: torch.Tensor | None = None) -> None:
    """Set the weights of `vae`, fresh from its config, in place: latents = scale * code.encode(sounds).

    Args:
        scale: [c]; 1 by default.

    Raises:
        UsageError: a width has no room for the pairs; the sentence names the field.
    """
    scale = torch.ones(code.latent_channels, dtype=torch.float64) if scale is None else scale
    causal = isinstance(vae, CausalOobleck)
    for side in (vae.encoder, vae.decoder):
        for module in side.modules():
            if isinstance(module, (Residual, OobleckResidualUnit)):  # the block is its shortcut
                _set(list(module.children())[-1], None)
    strides = [int(stride) for stride in vae.config.downsampling_ratios]
    outer = code.components * code.deviations

    first, *strided, last = _convolutions(vae.encoder)
    widths = [conv.out_channels for conv in (first, *strided)]
    _check_room(widths[-1], code.latent_channels, "encoder_hidden_size")
    maps = _maps(outer / scale, outer, strides, [width // 2 for width in widths[:-1]])
    _set(first, as_pairs(inverse_map(maps[0]))[:, :, None], _present(first, causal))
    for conv, inner, found in zip(strided, maps, maps[1:], strict=False):
        stride = conv.stride[0]
        parts = inverse_map(found).view(found.shape[1], stride, -1) @ inner  # [n of the next, s, n]
        rows = as_pairs(_read(parts)).transpose(1, 2)
        _set(conv, rows, stride if causal else stride // 2)
    _set(last, _read(torch.eye(code.latent_channels, dtype=torch.float64))[:, :, None], _present(last, causal))
    last.bias[code.latent_channels :] = SCALE

    first, *strided, last = _convolutions(vae.decoder)
    widths = [conv.out_channels for conv in (first, *strided)][::-1]  # from full rate up, as the encoder's
    _check_room(widths[-1], code.latent_channels, "decoder_channels")
    maps = _maps(outer, outer, strides, [width // 2 for width in widths[:-1]])
    _set(first, as_pairs(torch.diag(1 / scale))[:, :, None], _present(first, causal))
    for conv, inner, found in zip(strided, maps[-2::-1], maps[:0:-1], strict=True):
        stride = conv.stride[0]
        parts = inverse_map(inner) @ found.view(stride, -1, found.shape[1])  # [s, n of the next, n]
        rows = as_pairs(_read(parts).permute(1, 2, 0))
        _set(conv, rows, 0 if causal else stride // 2)
    _set(last, _read(maps[0])[:, :, None], _present(last, causal))


def _convolutions(side: Any) -> list[Any]:
    """Those outside of the residual blocks, in the order of the forward."""
    blocks = [module for module in side.modules() if isinstance(module, (Residual, OobleckResidualUnit))]
    inside = {id(module) for block in blocks for module in block.modules()}
    kinds = (nn.Conv1d, nn.ConvTranspose1d)
    return [module for module in side.modules() if isinstance(module, kinds) and id(module) not in inside]


def _present(conv: Any, causal: bool) -> int:
    """The tap of a convolution at full rate that sees its own position."""
    size = int(conv.kernel_size[0])
    return size - 1 if causal else size // 2


def _maps(last: torch.Tensor, inner: torch.Tensor, strides: list[int], rooms: list[int]) -> list[torch.Tensor]:
    """Maps [P, n] of coordinates to patches, level by level from one sample on; `last`: those of the latents, `inner`:
    of unit variance; rooms: of the pairs of each level before."""
    maps = [last]
    for stride, room in zip(reversed(strides), reversed(rooms), strict=True):
        inner = inner_map(inner.view(stride, -1, inner.shape[1]), room)
        maps.insert(0, sized(inner, 1))
    return maps


def _read(rows: torch.Tensor) -> torch.Tensor:
    """Rows that read signals [..., n] => rows that read their pairs behind a snake [..., 2 n]."""
    return torch.cat([rows, -rows], dim=-1) / 2


def _set(conv: Any, rows: torch.Tensor | None, first: int = 0) -> None:
    """Weights of a convolution: rows [out, in, taps] from tap `first` on, noise elsewhere; None: zeros."""
    kind = nn.ConvTranspose1d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv1d
    weight = torch.zeros_like(conv.weight)
    if rows is not None:
        nn.init.normal_(weight, std=NOISE)
        view = weight.transpose(0, 1) if kind is nn.ConvTranspose1d else weight
        view[: len(rows), : rows.shape[1]] = 0
        view[: len(rows), : rows.shape[1], first : first + rows.shape[2]] = rows.to(weight)
    if hasattr(conv, "weight_g"):  # weight norm: length and direction, of which a length of 0 has any
        conv.weight_g.copy_(torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True))
        if rows is not None:
            conv.weight_v.copy_(weight)
    else:
        conv.weight.copy_(weight)
    if conv.bias is not None:
        conv.bias.zero_()


def _check_room(width: int, needed: int, name: str) -> None:
    if width < 2 * needed:
        raise UsageError(
            f"model.{name}: init: linear needs two channels behind the last stride for each of the latent's {needed}, "
            f"got {width}; a larger one, fewer latent channels or init: noise would do"
        )
