"""`ldm-vae decode STORE OUT`: decode the latents of a store into PNG files."""

from __future__ import annotations

import argparse

HELP = "decode the latents of a store to PNG files"
DESCRIPTION = """\
Decode the first latents of STORE (their means) into PNG files in the folder OUT.

  ldm-vae decode my-latents pictures --count 16

The VAE is the one that the store was made with, where it lies now; --vae names another place, or a fine-tuned decoder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of a latent store")
    parser.add_argument("out", metavar="OUT", help="folder for the PNG files")
    parser.add_argument("--vae", metavar="VAE", help="the VAE (default: the one that the store names)")
    parser.add_argument("--count", type=int, help="how many samples (default: all)")
    parser.add_argument("--first", type=int, default=0, help="index of the first one (default 0)")
    parser.add_argument("--batch_size", type=int, default=8, help="latents per forward pass (default 8)")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store import LatentDataset
    from ldm_vae.latent_store.maintain.provenance import find_vae
    from ldm_vae.latent_store.read.pictures import decode_to_png

    dataset = LatentDataset(arguments.store, sample=False, columns=("key",))
    if not 0 <= arguments.first < len(dataset):
        raise UsageError(f"--first: expected 0 to {len(dataset) - 1}, got {arguments.first}")
    stop = len(dataset) if arguments.count is None else min(len(dataset), arguments.first + arguments.count)
    if stop <= arguments.first or arguments.batch_size < 1:
        raise UsageError("--count and --batch_size: expected at least 1")
    vae = find_vae(dataset.path, dataset.manifest, arguments.vae).to("cuda" if torch.cuda.is_available() else "cpu")
    written = decode_to_png(dataset, vae, arguments.out, range(arguments.first, stop), arguments.batch_size)
    print(f"{arguments.out}: {written:,} pictures, named by index and key")
