"""Tiny random instances of diffusers' autoencoders of images: what each class needs to be one, at 32 px."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models import autoencoders

from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import geometry_of


def _blocks(kind: str) -> tuple[str, str]:
    return (kind, kind)


DOWN_UP = {"down_block_types": _blocks("DownEncoderBlock2D"), "up_block_types": _blocks("UpDecoderBlock2D")}
CLIPS = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
         "temperal_downsample": [False, True, True]}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": DOWN_UP | {"block_out_channels": [2, 4], "norm_num_groups": 2},
    "AsymmetricAutoencoderKL": DOWN_UP
    | {"down_block_out_channels": (2, 4), "up_block_out_channels": (2, 4), "norm_num_groups": 2},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    },
    "VQModel": DOWN_UP | {"block_out_channels": [8, 16], "norm_num_groups": 8, "latent_channels": 3},
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.41407,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    },
    "AutoencoderKLFlux2": DOWN_UP | {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32, "scaling_factor": 0.75,
    },
    "AutoencoderKLKVAE": {
        "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2), "sample_size": 32,
    },
    "AutoencoderRAE": {
        "encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64, "patch_size": 8, "encoder_input_size": 32,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (2, 4), "encoder_norm_num_groups": 2,
        "encoder_down_block_types": _blocks("DownEncoderBlock2D"), "decoder_block_out_channels": (2, 4),
        "decoder_down_block_types": _blocks("ResnetDownsampleBlock2D"), "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 2, "decoder_up_block_types": _blocks("ResnetUpsampleBlock2D"),
    },
    "AutoencoderKLWan": CLIPS,
    "AutoencoderKLQwenImage": CLIPS,
    "AutoencoderKLQwenImage21": {
        "base_dim": 8, "decoder_base_dim": 8, "z_dim": 64, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1,
    },
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    """A network of the class with random weights, in eval mode, without gradients."""
    torch.manual_seed(0)
    found = getattr(autoencoders, name)(**CONFIGS[name] | changes).eval().requires_grad_(False)
    if hasattr(found, "bn"):  # at first an identity
        found.bn.running_mean.normal_()
        found.bn.running_var.uniform_(0.5, 2.0)
    return found


# `model` of a training from scratch, by kind: those of AutoencoderKL's and VQModel's kinds are in many files
SCRATCH: dict[str, dict[str, Any]] = {
    "kl": {"kind": "kl", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
           "attention_levels": [1]},
    "dc": {
        "kind": "dc", "latent_channels": 4, "attention_head_dim": 4,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {
            "block_types": ["ResBlock", "EfficientViTBlock"], "block_out_channels": [8, 16],
            "layers_per_block": [1, 1], "qkv_multiscales": [[], [3]],
        }.items()},
    },
    "flux2": {"kind": "flux2", "block_out_channels": [8, 16], "decoder_block_out_channels": [8, 12],
              "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
    "asymmetric": {
        "kind": "asymmetric", "down_block_out_channels": [8, 8], "up_block_out_channels": [8, 16],
        "layers_per_down_block": 1, "layers_per_up_block": 1, "norm_num_groups": 4,
    },
    "hunyuan_image": {"kind": "hunyuan_image", "block_out_channels": [32, 64], "layers_per_block": 1,
                      "latent_channels": 4},
}  # fmt: skip
CLASSES = sorted(name for name, one in vars(autoencoders).items() if inspect.isclass(one))
IMAGES = [name for name in CLASSES if family_of(name).is_served]
TRAINED = [name for name in IMAGES if not family_of(name).noise and name != "VQModel"]


def pixels_for(vae: Any, count: int = 2) -> torch.Tensor:
    geometry = geometry_of(vae)
    draw = torch.Generator().manual_seed(1)
    side = geometry.side or 32
    return torch.rand(count, geometry.in_channels, side, side, generator=draw) * 2 - 1
