"""Shapes of every `model.kind` that cannot be are refused in one sentence, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest
from sentences import refused
from tiny_classes import SCRATCH

from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.training.config import Training

THREE = {  # resolutions of a DC
    f"{side}_{name}": [value] * 3
    for side in ("encoder", "decoder")
    for name, value in {
        "block_types": "ResBlock", "block_out_channels": 8, "qkv_multiscales": [], "layers_per_block": 1,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("kl", {"attention_levels": [2]}, "attention_levels"),
        ("kl", {"layers_per_block": 0}, "layers_per_block"),
        ("flux2", {"decoder_block_out_channels": [8]}, "decoder_block_out_channels"),
        ("flux2", {"decoder_block_out_channels": [8, 6]}, "decoder_block_out_channels"),
        ("asymmetric", {"down_block_out_channels": [8, 6]}, "down_block_out_channels"),
        ("asymmetric", {"up_block_out_channels": [8, 8, 8]}, "up_block_out_channels"),
        ("asymmetric", {"down_block_out_channels": [4, 8], "layers_per_down_block": 0}, "layers_per_down_block"),
        ("hunyuan_image", {"block_out_channels": [32, 48]}, "block_out_channels"),
        ("hunyuan_image", {"block_out_channels": [32, 96]}, "block_out_channels"),  # 4 x 32 channels are no 96
        ("hunyuan_image", {"latent_channels": 64}, "latent_channels"),
        ("dc", {"encoder_block_out_channels": []}, "encoder_block_out_channels"),
        ("dc", {"decoder_layers_per_block": [1, 1, 1]}, "decoder_layers_per_block"),
        ("dc", {"encoder_block_out_channels": [8, 12]}, "encoder_block_out_channels"),
        ("dc", {"decoder_block_out_channels": [8, 12]}, "decoder_block_out_channels"),
        ("dc", {"latent_channels": 3}, "latent_channels"),
        ("dc", {"attention_head_dim": 32}, "attention_head_dim"),
        ("dc", {"encoder_block_types": ["ResBlock", "Mamba"]}, "model.encoder_block_types.1"),
        ("dc", {"decoder_qkv_multiscales": [[], [4]]}, "decoder_qkv_multiscales"),
        ("dc", {"encoder_block_out_channels": [8, 2], "latent_channels": 2, "attention_head_dim": 2,
                "downsample_block_type": "pixel_unshuffle"}, "pixel_unshuffle"),
        ("dc", THREE | {"encoder_layers_per_block": [1, 0, 1]}, "encoder_layers_per_block"),
        ("wan", {"temperal_downsample": [True]}, "temperal_downsample"),
        ("wan", {"temperal_downsample": [True, False]}, "temperal_downsample"),  # t 2
        ("wan", {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [True] * 3}, "temperal_downsample"),  # t 8
        ("wan", {"base_dim": 1, "dim_mult": [1, 1, 1]}, "base_dim"),  # nothing is half of one channel
        ("wan", {"decoder_base_dim": 1, "dim_mult": [1, 1, 1]}, "decoder_base_dim"),
        ("wan", {"num_res_blocks": 0}, "num_res_blocks"),
        ("wan", {"is_residual": True, "dim_mult": [1, 3, 3]}, "encoder"),  # 8 values of 8 channels are no 24
        ("wan", {"is_residual": True, "dim_mult": [3, 1, 1]}, "encoder"),
        ("wan", {"is_residual": True}, "encoder"),  # the last step is none: 8 channels are no 16
        ("wan", {"is_residual": True, "dim_mult": [1, 1, 16]}, "encoder"),
        ("wan", {"is_residual": True, "dim_mult": [1, 1, 8, 1], "temperal_downsample": [False, True, True]}, "decoder"),
        ("wan", {"patch_size": 1}, "model.patch_size"),
        ("ltx", {"block_out_channels": []}, "block_out_channels"),
        ("ltx", {"decoder_block_out_channels": [8]}, "decoder_block_out_channels"),
        ("ltx", {"layers_per_block": [1, 1]}, "layers_per_block"),
        ("ltx", {"decoder_layers_per_block": [1, 1]}, "decoder_layers_per_block"),
        ("ltx", {"spatio_temporal_scaling": [True]}, "spatio_temporal_scaling"),
        ("ltx", {"decoder_spatio_temporal_scaling": [True, True]}, "decoder_spatio_temporal_scaling"),
        ("vidtok", {"ch_mult": [1, 2]}, "ch_mult"),
        ("vidtok", {"num_res_blocks": 0}, "num_res_blocks"),
        ("vidtok", {"regularizer": "fsq", "z_channels": 9}, "z_channels"),
        ("vidtok", {"regularizer": "lfq"}, "model.regularizer"),
        ("vidtok", {"ch": 65536, "num_res_blocks": 256}, "ch"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_one_sentence(kind: str, changes: dict[str, Any], field: str) -> None:
    data = {"kind": "folder", "path": "none"}
    good = {
        "output_dir": "x",
        "max_train_images": 1,
        "learning_rate": 1e-4,
        "train_batch_size": 1,
        "losses": {"l1": {}},
    }
    config.validate(Training, good | {"data": data, "model": SCRATCH[kind]}, "test")
    with refused(UsageError, field):
        config.validate(Training, good | {"data": data, "model": SCRATCH[kind] | changes}, "test")
