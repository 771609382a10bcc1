"""Runs of train.prior on a tiny config, and the index stores that they read."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from fork_server import Child, Finished, fork
from images import write_images

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import write_store
from ldm_vae.models.vq import Config as VQ
from train import prior as program

TINY = {
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_train_images": 48,
    "log_every_images": 8,
    "checkpoint_every_images": 16,
    "checkpoints_total_limit": 3,
    "validate_every_images": 16,
    "validation_images": 6,
    "sample_images": 4,
    "dataloader_num_workers": 0,
    "model": {"kind": "transformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
}
MASKED = {"kind": "masked", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_res_blocks": 1}


def write_materials(folder: Path) -> Path:
    """vae/, a VQModel of 16 codes; indices/ of two classes [8, 8], heldout/ with pixels, birds_indices/ of
    other classes, and vectors/ of its means."""
    torch.manual_seed(0)
    shape = {"latent_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    VQ(num_vq_embeddings=16, mid_block_add_attention=False, **shape).build().save_pretrained(folder / "vae")
    for number, name in enumerate(("cats", "dogs")):
        write_images(folder / "images" / name, 5 + number, size=(20, 20))
        write_images(folder / "others" / name, 3, size=(16, 24))
    vae = load_autoencoder(folder / "vae")
    options = {"resolution": 16, "batch_size": 4, "vae_name": str(folder / "vae")}
    write_store(vae, open_source(folder / "images"), folder / "indices", **options)
    write_store(vae, open_source(folder / "others"), folder / "heldout", pixels=True, **options)
    for name in ("birds", "cats"):
        write_images(folder / "birds" / name, 2, size=(20, 20))
    write_store(vae, open_source(folder / "birds"), folder / "birds_indices", **options)
    write_store(vae, open_source(folder / "images"), folder / "vectors", store="mean", **options)
    return folder


def write_config(folder: Path, store: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | {"output_dir": str(folder / "run"), "latents": str(store)} | changes))
    return path


def start(config: Path, *flags: str) -> Child:
    return fork(program.main, [str(config), *flags])


def run(config: Path, *flags: str) -> Finished:
    return start(config, *flags).wait()
