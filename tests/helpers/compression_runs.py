"""Networks that compress: a textbook VAE trained for seconds on digits, a VQ autoencoder with a prior of random
weights; and files of `ldm-vae compress` that were changed."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from fork_server import fork
from torch import nn

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.compression.file import DIGEST, FIXED
from ldm_vae.core.config import Part
from ldm_vae.models.vq import Config as VQ
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.sampling import SamplingConfig
from ldm_vae.priors.transformer import Config as TransformerConfig
from train import autoencoder as training_program

SMALL = ("--model.block_out_channels", "8", "16", "16", "16", "--model.latent_channels", "4", "--learning_rate", "3e-3")


def train_on_digits(out: Path, digits: Path, images: int = 2048, *flags: str) -> Path:
    """A run of configs/textbook_vae.yaml, small and short."""
    paths = ("--data.path", f"{digits}/train", "--validation_data.path", f"{digits}/heldout", "--output_dir", str(out))
    # averages of at most 5 % of the images that were seen would be those of the first ones
    short = ("--max_train_images", str(images), "--ema_halflife_images", "16", "--validate_every_images", str(images))
    done = fork(training_program.main, ["configs/textbook_vae.yaml", *paths, *short, *SMALL, *flags]).wait(600)
    assert done.returncode == 0, done.stderr
    return out


def write_vq(folder: Path) -> Path:
    """A VQModel of 16 codes, f = 2."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4}
    VQ(num_vq_embeddings=16, mid_block_add_attention=False, layers_per_block=1, **shape).build().save_pretrained(folder)
    return folder


def write_prior(run: Path, vae: Path, model: Part | None = None, codes: int = 16,
                shape: tuple[int, ...] = (1, 4, 4), classes: tuple[int, ...] = ()) -> CodeGenerator:  # fmt: skip
    """RUN/prior of random weights, far from where training starts, at which all codes are alike."""
    model = model or TransformerConfig(num_layers=2, num_attention_heads=2, attention_head_dim=4)
    prior = model.build(codes, shape, len(classes))
    draw = torch.Generator().manual_seed(1)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.5, generator=draw)
    prior = prior.eval().requires_grad_(False)
    found = CodeGenerator(prior, model, load_autoencoder(vae), codes, shape, SamplingConfig(), classes)
    found.write(run)
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def summed(content: bytes) -> bytes:
    """The same with the checksum that belongs to it: what a person who means harm sends."""
    return content[:-DIGEST] + hashlib.sha256(content[:-DIGEST]).digest()


def with_header(data: bytes, /, **changes: object) -> bytes:
    """A file with other values in its header, and its checksum."""
    magic, version, length = FIXED.unpack_from(data)
    tree = json.loads(zlib.decompress(data[FIXED.size : FIXED.size + length]))
    packed = zlib.compress(json.dumps(tree | changes).encode())
    return summed(FIXED.pack(magic, version, len(packed)) + packed + data[FIXED.size + length :])
