"""`ldm-vae decode STORE OUT`: decode the latents of a store into PNG files."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_vae.core.request import argument, flag

HELP = "decode the latents of a store to PNG files"
DESCRIPTION = """\
Decode the first latents of STORE (their means) into PNG files in the folder OUT.

  ldm-vae decode my-latents pictures --count 16

By default, the VAE is the one with which the store was made. --vae gives its new location, or a fine-tuned decoder.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    store: str = argument("STORE", "folder or URL of a latent store")
    out: str = argument("OUT", "folder for the PNG files")
    vae: str | None = flag("VAE (default: the one named in the store)", metavar="VAE")
    count: int | None = flag("number of samples (default: all)")
    first: int = flag("index of the first sample (default 0)", 0)
    batch_size: int = flag("latents per forward pass (default 8)", 8)


def run(request: Request) -> None:
    import torch

    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store import LatentDataset
    from ldm_vae.latent_store.format.manifest import place_of, read_finished
    from ldm_vae.latent_store.maintain.provenance import find_vae
    from ldm_vae.latent_store.read.pictures import decode_to_png

    law = read_finished(place_of(request.store)).for_decoding
    dataset = LatentDataset(request.store, sample=False, columns=("key",), normalisation=law)
    if not 0 <= request.first < len(dataset):
        raise UsageError(f"--first: expected 0 to {len(dataset) - 1}, got {request.first}")
    stop = len(dataset) if request.count is None else min(len(dataset), request.first + request.count)
    if stop <= request.first or request.batch_size < 1:
        raise UsageError("--count and --batch_size: expected at least 1")
    vae = find_vae(dataset.path, dataset.manifest, request.vae).to("cuda" if torch.cuda.is_available() else "cpu")
    written = decode_to_png(dataset, vae, request.out, range(request.first, stop), request.batch_size)
    print(f"{request.out}: {written:,} pictures, named by index and key")
