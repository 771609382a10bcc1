"""ldm-vae: train, export, cache and measure the autoencoder of a latent diffusion model.

Three things are passed around: *pixels* [B, C, H, W] in [-1, 1]; *moments*, mean and logvar [B, c, h, w] of the
posterior; *latents*, what a diffusion model sees: (z - shift) * scale. With a VAE in the folder `my-vae` and images in
`photos`:

>>> import torch, ldm_vae
>>> vae = ldm_vae.load_autoencoder("my-vae")  # a folder, a single file, a hub id: a model of diffusers
>>> moments = ldm_vae.encode(vae, torch.zeros(1, 3, 64, 64))
>>> ldm_vae.decode(vae, moments.mean).shape
torch.Size([1, 3, 64, 64])

>>> photos = ldm_vae.open_images("photos", vae)  # a folder, zip, tar shards, parquet, a hub dataset
>>> manifest = ldm_vae.write_store(vae, photos, "my-latents", resolution=64)
>>> latents = ldm_vae.LatentDataset("my-latents")  # memory-mapped; noise anew at each visit
>>> len(latents), latents[0]["latents"].shape
(12, torch.Size([4, 32, 32]))

>>> result = ldm_vae.evaluate(vae, photos, resolution=64, metrics=["psnr"])
>>> result.images, result.metrics["psnr"].mean > 0
(12, True)

Training is a program: `accelerate launch -m ldm_vae train CONFIG`, or `ldm-vae train CONFIG`; `ldm-vae --help` has
the rest. Names are loaded on first use, since torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# first: it asks who started this process before torch is imported
from ldm_vae.core import parent_process as parent_process

if TYPE_CHECKING:
    from ldm_vae.autoencoder.config import AutoencoderConfig
    from ldm_vae.autoencoder.latents import Moments, decode, encode
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.normalisation import Normalisation
    from ldm_vae.autoencoder.preparation import open_images
    from ldm_vae.export.diffusers_folder import write_vae
    from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
    from ldm_vae.metrics.evaluate import evaluate, measure

__version__ = "0.1.0"
__all__ = [
    "AutoencoderConfig",
    "LatentDataset",
    "Moments",
    "Normalisation",
    "decode",
    "encode",
    "evaluate",
    "load_autoencoder",
    "measure",
    "open_images",
    "read_manifest",
    "verify",
    "write_store",
    "write_vae",
]

_HOMES = {
    "AutoencoderConfig": "autoencoder.config",
    "LatentDataset": "latent_store",
    "Moments": "autoencoder.latents",
    "Normalisation": "autoencoder.normalisation",
    "decode": "autoencoder.latents",
    "encode": "autoencoder.latents",
    "evaluate": "metrics.evaluate",
    "load_autoencoder": "autoencoder.load",
    "measure": "metrics.evaluate",
    "open_images": "autoencoder.preparation",
    "read_manifest": "latent_store",
    "verify": "latent_store",
    "write_store": "latent_store",
    "write_vae": "export.diffusers_folder",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ldm_vae.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # what Python itself has of a module, and the public names: no module that happens to be imported already
    return [*(name for name in globals() if name.startswith("__")), *__all__]
