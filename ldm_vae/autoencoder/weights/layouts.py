"""Layouts: the names that single files have for the tensors of a class, where they are not diffusers' own.

A layout is written once, from diffusers' names to the file's; reading goes through the names that a network of the
right shape has. Two rules hold for every layout: what is a matrix in the network is a 1x1 convolution in the file, and
tensors that share one name there (q, k and v of DC-AE) are one tensor, stacked along its first axis.

    AutoencoderKL              latent-diffusion's (LDM)
    AutoencoderKLFlux2         Black Forest Labs': LDM's, the quant convs inside encoder and decoder, and `bn`
    AutoencoderKLWan, -Qwen... Wan-Video's of 2.1; of 2.2 where `is_residual`
    AutoencoderKLHunyuanImage  Tencent's: LDM's, but the decoder counts from the latents
    AutoencoderDC              mit-han-lab's efficientvit, which SANA's files have too

Read in the sources of latent-diffusion, flux2, Wan2.1 and Wan2.2, HunyuanImage-2.1 and efficientvit, and in diffusers'
converters of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder.weights import ldm_keys
from ldm_vae.autoencoder.weights.files import Entry

Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """to_file: the file's name of a tensor, from its name and the network's config. mark: a name that no other layout
    has; None of LDM's, whose config its tensors tell."""

    to_file: Callable[[str, Mapping[str, Any]], str]
    mark: str | None = None


def file_names(network: torch.nn.Module) -> dict[str, str]:
    """A network's own names => the file's; empty where its class has no layout."""
    layout, config = LAYOUTS.get(type(network).__name__), getattr(network, "config", {})
    return {} if layout is None else {name: layout.to_file(name, config) for name in network.state_dict()}


def to_file(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a network of a class in LAYOUTS in the file's names and shapes, in its own order."""
    state, stacks = network.state_dict(), fused(network)
    pieces: dict[str, list[torch.Tensor]] = {}
    for name, there in file_names(network).items():
        value = state[name]
        pieces.setdefault(there, []).append(value[:, :, None, None] if value.ndim == 2 else value)
    return {there: torch.cat(found) if there in stacks else found[0] for there, found in pieces.items()}


def divided(network: torch.nn.Module, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """Entries of a file with each tensor that holds several of the network's in the place of one replaced by them."""
    stacks, found = fused(network), dict(entries)
    for name, entry in entries.items():
        there = next((one for one in stacks if name.endswith(one)), None)
        if there is None or entry.shape[0] % len(stacks[there]):
            continue
        del found[name]
        count = len(stacks[there])
        for index, own in enumerate(stacks[there]):
            found[name.removesuffix(there) + own] = Entry(
                (entry.shape[0] // count, *entry.shape[1:]),
                lambda entry=entry, count=count, index=index: entry.read().chunk(count)[index],  # type: ignore[misc]
            )
    return found


def fused(network: torch.nn.Module) -> dict[str, list[str]]:
    """The file's names that hold several tensors => the network's own names of them, in order."""
    owners: dict[str, list[str]] = {}
    for name, there in file_names(network).items():
        owners.setdefault(there, []).append(name)
    return {there: names for there, names in owners.items() if len(names) > 1}


def classes_told_by(names: Sequence[str]) -> list[str]:
    """The classes whose layout a file's names have; none where it is LDM's, diffusers' or nobody's."""
    return [kind for kind, one in LAYOUTS.items() if one.mark and any(name.endswith(one.mark) for name in names)]


def _renamed(name: str, rules: Rules) -> str:
    for pattern, there in rules:
        name = re.sub(pattern, there, name)
    return name


# --- LDM and its kin --------------------------------------------------------------------------------------------------


def _ldm(name: str, config: Mapping[str, Any]) -> str:
    return ldm_keys.to_ldm_name(name, len(config["block_out_channels"]))


def _flux2(name: str, config: Mapping[str, Any]) -> str:
    name = re.sub(r"^quant_conv", "encoder.quant_conv", name)
    return _ldm(re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name), config)


_HUNYUAN: Rules = (
    (r"mid_block\.attentions\.0\.(?:to_)?", "mid.attn_1."),
    (r"(attn_1)\.proj\.", r"\1.proj_out."),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"conv_shortcut", "nin_shortcut"),
)


def _hunyuan_image(name: str, config: Mapping[str, Any]) -> str:
    # diffusers numbers blocks and samplers in one row; a stage has its blocks and, while the size changes, a sampler
    sampled = min(int(config["spatial_compression_ratio"]).bit_length() - 1, len(config["block_out_channels"]) - 1)
    for ours, theirs, sampler, more in (("down_blocks", "down", "downsample", 0), ("up_blocks", "up", "upsample", 1)):
        if (match := re.search(rf"\.{ours}\.(\d+)\.", name)) is not None:
            blocks, index = int(config["layers_per_block"]) + more, int(match[1])
            with_sampler = sampled * (blocks + 1)
            stage, place = divmod(index, blocks + 1)
            if index >= with_sampler:
                stage, place = divmod(index - with_sampler, blocks)
                stage += sampled
            part = sampler if place == blocks else f"block.{place}"
            return _renamed(name.replace(match[0], f".{theirs}.{stage}.{part}."), _HUNYUAN)
    return _renamed(name, _HUNYUAN)


# --- Wan --------------------------------------------------------------------------------------------------------------

_WAN: Rules = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"^(\w+coder)\.conv_in", r"\1.conv1"),
    (r"^(\w+coder)\.norm_out", r"\1.head.0"),
    (r"^(\w+coder)\.conv_out", r"\1.head.2"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"down_blocks\.(\d+)\.resnets", r"downsamples.\1.downsamples"),
    (r"down_blocks", "downsamples"),
    (r"(\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\d+)\.conv2\.", r"\1.residual.6."),
    (r"conv_shortcut", "shortcut"),
)


def _wan(name: str, config: Mapping[str, Any]) -> str:
    blocks = int(config["num_res_blocks"])
    residual = config.get("is_residual", False)
    if (match := re.search(r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers?(?:\.0)?)\.", name)) is not None:
        # a stage is its blocks, one more than the encoder's, and a sampler; of 2.1 all stages are in one row
        stage, place = int(match[1]), blocks + 1 if match[2] is None else int(match[2])
        where = f"upsamples.{stage}.upsamples.{place}." if residual else f"upsamples.{stage * (blocks + 2) + place}."
        name = name.replace(match[0], where)
    name = re.sub(r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{blocks}.", name)
    return _renamed(name, _WAN)


# --- DC-AE ------------------------------------------------------------------------------------------------------------

_DC: Rules = (
    (r"^encoder\.conv_in\.(conv\.)?", r"encoder.project_in.\1conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"^decoder\.conv_in\.", "decoder.project_in.main.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"^decoder\.conv_out\.(conv\.)?", r"decoder.project_out.op_list.2.\1conv."),
    (r"^(\w+coder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.", r"\1.stages.\2.op_list.\3."),
    (r"(stages\.\d+\.op_list\.\d+)\.conv([12])\.", r"\1.main.conv\2.conv."),
    (r"(stages\.\d+\.op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
    (r"(stages\.\d+\.op_list\.\d+)\.conv\.", r"\1.main.conv.conv."),
    (r"\.attn\.to_[qkv]\.", ".context_module.main.qkv.conv."),
    (r"\.attn\.to_qkv_multiscale\.(\d+)\.proj_in\.", r".context_module.main.aggreg.\1.0."),
    (r"\.attn\.to_qkv_multiscale\.(\d+)\.proj_out\.", r".context_module.main.aggreg.\1.1."),
    (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
    (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
    (r"\.conv_out\.conv_(inverted|depth|point)\.", r".local_module.main.\1_conv.conv."),
    (r"\.conv_out\.norm\.", ".local_module.main.point_conv.norm."),
)


def _dc(name: str, config: Mapping[str, Any]) -> str:
    there = _renamed(name, _DC)
    if config["downsample_block_type"].lower() == "conv" and there.startswith("encoder.stages."):
        there = there.replace(".main.conv.conv.", ".main.conv.")  # a strided convolution, without a shuffle around it
    return there


LAYOUTS: Mapping[str, Layout] = {
    "AutoencoderKL": Layout(_ldm),
    "AutoencoderKLFlux2": Layout(_flux2),
    "AutoencoderKLWan": Layout(_wan, "decoder.middle.0.residual.0.gamma"),
    "AutoencoderKLQwenImage": Layout(_wan, "decoder.middle.0.residual.0.gamma"),
    "AutoencoderKLHunyuanImage": Layout(_hunyuan_image, "decoder.up.0.upsample.conv.weight"),
    "AutoencoderDC": Layout(_dc, "encoder.project_out.main.op_list.0.conv.weight"),
}
