"""`ldm-vae decode STORE OUT`: decode the latents of a store into PNG files, those of sounds into WAV or FLAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm_vae.core.request import argument, flag

HELP = "decode the latents of a store to PNG files, or files of sound"
DESCRIPTION = """\
Decode the first latents of STORE (their means) into PNG files in the folder OUT; those of sounds into files of sound.

  ldm-vae decode my-latents pictures --count 16
  ldm-vae decode my-codes heard --codebooks 4      # of residual codes: fewer codebooks are a code of less rate

By default, the VAE is the one with which the store was made. --vae gives its new location, or a fine-tuned decoder.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    store: str = argument("STORE", "folder or URL of a latent store")
    out: str = argument("OUT", "folder for the files")
    vae: str | None = flag("VAE (default: the one named in the store)", metavar="VAE")
    count: int | None = flag("number of samples (default: all)")
    first: int = flag("index of the first sample (default 0)", 0)
    batch_size: int = flag("latents per forward pass (default 8)", 8)
    codebooks: int | None = flag("of residual codes, decode the first K codebooks (default: all)", metavar="K")
    sound_format: Literal["wav", "flac"] = flag("of sounds: wav (32-bit floats, default), or flac (24 bits)", "wav")


def run(request: Request) -> None:
    import torch

    from ldm_vae.autoencoder.codebooks import check_count
    from ldm_vae.core.errors import UsageError
    from ldm_vae.data.transforms import decoding_of
    from ldm_vae.latent_store import LatentDataset
    from ldm_vae.latent_store.format.manifest import place_of, read_finished
    from ldm_vae.latent_store.maintain.provenance import find_vae
    from ldm_vae.latent_store.read.pictures import decode_to_png
    from ldm_vae.latent_store.read.sound_files import decode_to_sounds

    manifest = read_finished(place_of(request.store))
    if request.codebooks is not None:
        check_count(request.codebooks, manifest.identity.codebooks, f"store {request.store}")
    decoding = decoding_of(manifest.identity.preprocessing)
    of_sounds = decoding is not None and decoding.signal == "audio"
    columns = ("key", "crop_box") if of_sounds else ("key",)
    dataset = LatentDataset(request.store, sample=False, columns=columns, normalisation=manifest.for_decoding)
    if not 0 <= request.first < len(dataset):
        raise UsageError(f"--first: expected 0 to {len(dataset) - 1}, got {request.first}")
    stop = len(dataset) if request.count is None else min(len(dataset), request.first + request.count)
    if stop <= request.first or request.batch_size < 1:
        raise UsageError("--count and --batch_size: expected at least 1")
    vae = find_vae(dataset.path, dataset.manifest, request.vae).to("cuda" if torch.cuda.is_available() else "cpu")
    chosen, size = range(request.first, stop), request.batch_size
    if of_sounds:
        written = decode_to_sounds(dataset, vae, request.out, chosen, request.sound_format, size, request.codebooks)
    else:
        written = decode_to_png(dataset, vae, request.out, chosen, size, request.codebooks)
    print(f"{request.out}: {written:,} {'sounds' if of_sounds else 'pictures'}, named by index and key")
