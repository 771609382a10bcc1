"""Runs of train.diffusion on a tiny config, and the smallest arguments of the probe."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from fork_server import Child, Finished, fork
from images import write_images

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import write_store
from train import diffusion as program

TINY = {
    "train_batch_size": 4,
    "learning_rate": 1e-4,
    "max_train_images": 48,
    "log_every_images": 8,
    "checkpoint_every_images": 16,
    "checkpoints_total_limit": 3,
    "sample_images": 4,
    "measure_images": 0,
    "dataloader_num_workers": 0,
    "sampling": {"steps": 2},
    "denoiser": {"kind": "dit", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
}


def write_materials(folder: Path) -> Path:
    """vae/, a store of two classes (latents [4, 8, 8]) and one without labels."""
    torch.manual_seed(0)
    AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().save_pretrained(
        folder / "vae"
    )
    for number, name in enumerate(("cats", "dogs")):
        write_images(folder / "images" / name, 5 + number, size=(20, 20))
    vae = load_autoencoder(folder / "vae")
    for name, images in (("latents", folder / "images"), ("plain", folder / "images" / "cats")):
        write_store(vae, open_source(images), folder / name, resolution=16, batch_size=4, vae_name=str(folder / "vae"))
    return folder


def write_config(folder: Path, store: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | {"output_dir": str(folder / "run"), "latents": str(store)} | changes))
    return path


def start(config: Path, *flags: str) -> Child:
    return fork(program.main, [str(config), *flags])


def run(config: Path, *flags: str) -> Finished:
    return start(config, *flags).wait()


SMALL = [
    "--resolution",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--head_dim",
    "8",
    "--steps",
    "2",
    "--most_tokens",
    "16",
]
