"""Tiny random instances of diffusers' autoencoders of images, clips and sounds: what each class needs to be one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models import autoencoders

from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.lengths import lengths_of


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
_LTX = {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "patch_size": 1, "patch_size_t": 1}
_HUNYUAN_15 = {"latent_channels": 4, "block_out_channels": (32, 32, 32, 32, 32), "layers_per_block": 1}
_VIDTOK = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
# one class may stand here as several networks: the class's name is what stands before a blank
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": _blocks("DownEncoderBlock2D"),
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 16,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanImageRefiner": _HUNYUAN_15,
    "AutoencoderKLHunyuanVideo15": _HUNYUAN_15,
    "AutoencoderKLKVAEVideo": {
        "ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 4,
    },
    "AutoencoderKLLTXVideo": _LTX | {
        "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    },
    "AutoencoderKLLTXVideo timestep": _LTX | {
        "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4,
        "upsample_residual": (True,) * 3, "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4, "upsample_factor": (2, 2, 2), "timestep_conditioning": True,
    },
    "AutoencoderKLLTX2Video": _LTX | {
        "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 8,
    },
    "AutoencoderKLMiniMaxH3": {
        "latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (2, 2), "norm_num_groups": 8,
        "decoder_num_layers": 2, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 8,
        "decoder_num_register_tokens": 2, "decoder_ffn_mult": 2, "latents_mean": (0.5, -1.0, 0.0, 0.25),
        "latents_std": (1.0, 2.0, 0.5, 1.5),
    },
    "AutoencoderKLMochi": {
        "latent_channels": 12, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLQwenImage": CLIPS,
    "AutoencoderKLQwenImage21": CONFIGS["AutoencoderKLQwenImage21"],
    "AutoencoderKLWan": CLIPS,
    "AutoencoderKLWan 2.2": CLIPS | {
        "base_dim": 8, "z_dim": 48, "latents_mean": [0.5] * 48, "in_channels": 12, "latents_std": [2.0] * 48,
        "out_channels": 12, "patch_size": 2, "is_residual": True, "scale_factor_spatial": 16,
    },
    "AutoencoderVidTok": _VIDTOK | {"z_channels": 4},
    "AutoencoderVidTok fsq": _VIDTOK | {
        "z_channels": 6, "double_z": False, "regularizer": "fsq", "is_causal": False,
    },
    "Kandinsky6SRVAE": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 16, 32), "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": 1, "temporal_compression_start_level": 0,
    },
}  # fmt: skip

SOUND_CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderOobleck": {
        "encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4, "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2], "sampling_rate": 8000,
    },
    "AutoencoderSAME": {
        "patch_size": 4, "encoder_channels": 16, "encoder_c_mults": [1, 2], "encoder_strides": [2, 2],
        "encoder_transformer_depths": [1, 1], "latent_dim": 8, "use_differential_attention": False, "dim_heads": 8,
        "ff_mult": 2,
    },
    "AutoencoderKLKVAEAudio": {
        "encoder_dim": 8, "encoder_rates": [2, 4], "latent_dim": 32, "codebook_dim": 4, "decoder_dim": 16,
        "decoder_rates": [4, 2], "attn_num_heads": 2,
    },
    "AutoencoderKLMiniMaxH3Audio": {
        "encoder_dim": 4, "encoder_rates": (2, 2), "latent_dim": 32, "latent_channels": 8, "num_attention_heads": 2,
        "decoder_dim": 16, "decoder_rates": (2, 2), "decoder_kernel_sizes": (4, 4), "resblock_kernel_sizes": (3, 7),
        "resblock_dilation_sizes": ((1, 3), (1, 3)), "latents_mean": [0.25 * number for number in range(8)],
        "latents_std": [0.5 + number for number in range(8)],
    },
    "LongCatAudioDiTVae": {
        "channels": 16, "c_mults": [1, 2], "strides": [2, 4], "latent_dim": 4, "encoder_latent_dim": 8,
        "downsampling_ratio": 8,
    },
    "Cosmos3AVAEAudioTokenizer": {
        "sampling_rate": 8000, "hop_size": 4, "enc_dim": 4, "enc_num_blocks": 1, "enc_n_fft": 8, "enc_hop_length": 2,
        "enc_latent_dim": 8, "enc_c_mults": (1,), "enc_strides": (2,), "vocoder_input_dim": 4, "dec_dim": 4,
        "dec_c_mults": (1, 2), "dec_strides": (2, 2),
    },
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    """A network of the class with random weights, in eval mode, without gradients."""
    torch.manual_seed(0)
    config = (CONFIGS | CLIP_CONFIGS | SOUND_CONFIGS)[name]
    found = getattr(autoencoders, name.partition(" ")[0])(**config | changes).eval().requires_grad_(False)
    if family_of(found).law == "buffers":
        found.latents_mean.normal_()
        found.latents_std.uniform_(0.5, 2.0)
    if name == "AutoencoderSAME":  # what is added to its tokens begins at zero: it would encode nothing
        for one in found.parameters():
            one.normal_(std=0.2) if not one.any() else None
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
    "wan": {"kind": "wan", "base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "z_dim": 4,
            "temperal_downsample": [True, True]},
    "ltx": {
        "kind": "ltx", "latent_channels": 4, "patch_size": 2,
        **{f"{side}{name}": value for side in ("", "decoder_") for name, value in {
            "block_out_channels": [8, 16], "layers_per_block": [1, 1, 1], "spatio_temporal_scaling": [True, False],
        }.items()},
    },
    "vidtok": {"kind": "vidtok", "ch": 8, "ch_mult": [1, 1, 2], "num_res_blocks": 1},
}  # fmt: skip
CLIP_KINDS = ("wan", "ltx", "vidtok")
CLASSES = sorted(name for name, one in vars(autoencoders).items() if inspect.isclass(one))
STILLS = ["AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan"]  # pipelines give them one frame
IMAGES = sorted([name for name in CLASSES if family_of(name).signal == "image"] + STILLS)
VIDEOS = [name for name in CLASSES if family_of(name).signal == "video" and family_of(name).is_served]
SOUNDS = [name for name in CLASSES if family_of(name).signal == "audio" and family_of(name).is_served]
TRAINED = [name for name in IMAGES if not family_of(name).noise and name != "VQModel"]


def clips_for(vae: Any, count: int = 2, seed: int = 1, side: int = 32) -> torch.Tensor:
    """Clips of the shortest length of three latent frames or more."""
    lengths, draw = lengths_of(vae), torch.Generator().manual_seed(seed)
    frames = next(frames for frames in range(lengths.first, 100, lengths.step or 100)
                  if not lengths.step or lengths.latent_frames(frames) > 2)  # fmt: skip
    return torch.rand(count, geometry_of(vae).in_channels, frames, side, side, generator=draw) * 2 - 1


def small_clips_for(vae: Any, count: int = 2) -> torch.Tensor:
    """The same, of 2 x 2 latents or more."""
    return clips_for(vae, count, side=max(16, 2 * geometry_of(vae).factor))


def pixels_for(vae: Any, count: int = 2) -> torch.Tensor:
    geometry = geometry_of(vae)
    draw = torch.Generator().manual_seed(1)
    side = geometry.side or 32
    return torch.rand(count, geometry.in_channels, side, side, generator=draw) * 2 - 1


def sounds_for(vae: Any, count: int = 2, positions: int = 16) -> torch.Tensor:
    """Sounds of so many latent positions."""
    geometry = geometry_of(vae)
    draw = torch.Generator().manual_seed(1)
    return torch.rand(count, geometry.in_channels, positions * geometry.factor, generator=draw) - 0.5
