"""Networks of the newer classes, as deep as the published ones and narrower, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan

_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_MULTISCALES = ((), (), (), (5,), (5,), (5,))
_CLIPS = {"base_dim": 32, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
# class, and what its config has smaller than the published one's; the comment tells how it encodes
NETWORKS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dc": (  # f 32, deterministic
        AutoencoderDC,
        {
            "latent_channels": 32,
            "attention_head_dim": 16,
            "encoder_block_types": _BLOCKS,
            "decoder_block_types": _BLOCKS,
            "encoder_block_out_channels": (32, 32, 64, 64, 128, 128),
            "decoder_block_out_channels": (32, 32, 64, 64, 128, 128),
            "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
            "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
            "encoder_qkv_multiscales": _MULTISCALES,
            "decoder_qkv_multiscales": _MULTISCALES,
        },
    ),
    "flux2": (AutoencoderKLFlux2, {"block_out_channels": (32, 64, 64, 64)}),  # 2x2 patches of an f8 network's latents
    "wan": (AutoencoderKLWan, _CLIPS),  # frame by frame, with a cache
    "qwenimage": (AutoencoderKLQwenImage, _CLIPS),  # the same
}


def network(name: str) -> Any:
    """One of NETWORKS, in eval mode, without gradients."""
    torch.manual_seed(0)
    kind, config = NETWORKS[name]
    return kind(**config).eval().requires_grad_(False)
