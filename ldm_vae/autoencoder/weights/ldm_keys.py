"""Names of a KL autoencoder's tensors: diffusers' and latent-diffusion's (LDM), the one that single files use.

    diffusers                                     LDM
    encoder.down_blocks.{i}.resnets.{j}.conv1     encoder.down.{i}.block.{j}.conv1
    encoder.down_blocks.{i}.downsamplers.0.conv   encoder.down.{i}.downsample.conv
    decoder.up_blocks.{i}.resnets.{j}             decoder.up.{n-1-i}.block.{j}        (LDM counts by resolution)
    *.mid_block.resnets.{j}                       *.mid.block_{j+1}
    *.mid_block.attentions.0.to_q [C, C]          *.mid.attn_1.q [C, C, 1, 1]         (a 1x1 convolution)
    *.conv_shortcut, *.conv_norm_out              *.nin_shortcut, *.norm_out

Only the direction diffusers => LDM is written as rules: reading goes through the names that a model of the right shape
has. quant_conv and post_quant_conv are called the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# what diffusers called the same layers until 0.17; files of that age are still around
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

PREFIXES = ("first_stage_model.", "vae.", "")  # a full checkpoint, one with diffusers' component name, a bare file


def to_ldm_name(name: str, blocks: int) -> str:
    """LDM's name of diffusers' tensor `name`, for an autoencoder of `blocks` resolutions."""
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    # attention sits in the middle (mid.attn_1), or follows each residual block of a resolution (down.3.attn.0)
    name = re.sub(r"mid_block\.attentions\.(\d+)", lambda m: f"mid.attn_{int(m[1]) + 1}", name)
    name = re.sub(r"\.attentions\.(\d+)", r".attn.\1", name)
    name = re.sub(r"(attn[._]\d+)\.(group_norm|to_q|to_k|to_v|to_out\.0)", lambda m: f"{m[1]}.{_ATTENTION[m[2]]}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
    name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
    name = name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")


def current_name(name: str) -> str:
    """Today's name of a tensor in a file of diffusers' names."""
    match = re.search(r"attentions\.\d+\.(query|key|value|proj_attn)\.", name)
    return name if match is None else name.replace(f".{match[1]}.", f".{_OLD_ATTENTION[match[1]]}.")


def find_prefix(names: Iterable[str]) -> str | None:
    """The prefix before `encoder.conv_in.weight`; None if no autoencoder is among the names."""
    exist = set(names)
    return next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in exist), None)


def has_diffusers_names(names: Iterable[str]) -> bool:
    """True if names without prefix are diffusers' (`encoder.down_blocks.`) rather than LDM's (`encoder.down.`)."""
    return any(name.startswith("encoder.down_blocks.") for name in names)
