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
