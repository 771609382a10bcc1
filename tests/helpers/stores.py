"""Small latent stores: their settings, how they are written, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checksums import tree
from diffusers import AutoencoderKL
from store_sources import Album, Pictures

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.latent_store import LatentDataset, write_store

SETTINGS: dict[str, Any] = {"resolution": 16, "batch_size": 4, "shard_size": 8}


def encode(vae: AutoencoderKL, source: Album, out: Path, **more: Any) -> None:
    write_store(vae, source, out, **SETTINGS, **more)


def contents(store: Path) -> dict[str, torch.Tensor]:
    data = LatentDataset(store, raw=True)
    items = [data[index] for index in range(len(data))]
    assert len({item["key"] for item in items}) == len(items), "a key is there twice"
    return {item["key"]: item["mean"] for item in items}


def equal(store: Path, fresh: Path) -> bool:
    one, other = contents(store), contents(fresh)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def encoded(out: Path) -> Path:
    """OUT/latents of 21 pictures in three shards, and its VAE in OUT/vae."""
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()
    vae.save_pretrained(out / "vae")
    write_store(vae, Pictures(), out / "latents", **SETTINGS, views="flip", vae_name=str(out / "vae"))
    return out


def same(remote: LatentDataset, local: LatentDataset) -> None:
    """Every item, in both."""
    assert len(remote) == len(local) > 0
    for index in range(len(local)):
        one, other = remote[index], local[index]
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value


def shard_files(store: Path) -> dict[str, str]:
    return tree(store / "shards")
