"""`ldm-vae drift BASE TUNED DATA`: measure whether a frozen diffusion model can go on with the fine-tuned VAE."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, data_flags

HELP = "compare a fine-tuned VAE with its base: does the base's diffusion model still apply?"
DESCRIPTION = """\
  ldm-vae drift sd-vae my-vae photographs --resolution 256

Compare the latents (cosine, RMS, shift and scale per channel) and all four combinations of encoder and decoder (PSNR,
LPIPS; of sounds SNR, mel distance), and print a verdict.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    base: str = argument("BASE", "the VAE that the diffusion model was trained with")
    tuned: str = argument("TUNED", "the VAE that replaces it")
    data: str = argument(
        "DATA", "images, clips (--frames) or sounds: folder, dataset, list file, zip, tar shards, hub id"
    )
    resolution: int | None = flag("side of the centre crop (default: BASE's sample_size)")
    images: int = flag("number of images, evenly spaced over DATA (default 64)", 64, metavar="N")
    batch_size: int = flag("images per forward pass (default 8)", 8)
    no_lpips: bool = flag("PSNR only; needs no LPIPS weights (of sounds: SNR only)", False)
    json: bool = flag("print JSON", False)
    flags: DataFlags = data_flags()


def run(request: Request) -> None:
    import json

    import torch

    from ldm_vae.autoencoder.geometry import is_of_sounds, resolution_of
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.export.drift_report import measure_drift
    from ldm_vae.metrics.batches import image_batches, size_of, spread

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tuned = (load_autoencoder(vae).to(device) for vae in (request.base, request.tuned))
    preparation = preparation_of({request.base: base, request.tuned: tuned}, request.flags)
    sounds = is_of_sounds(base)
    asked = request.resolution if sounds else resolution_of(request.resolution, base, request.base)
    resolution = size_of(preparation.decoding, asked)
    for note in preparation.notes:
        print(note, file=sys.stderr)
    source = preparation.open(request.data)
    chosen = spread(len(source), request.images)
    batches = image_batches(source, chosen, resolution, batch_size=request.batch_size)
    total = -(-len(chosen) // request.batch_size)
    found = measure_drift(
        base, tuned, batches, resolution=resolution, lpips=not request.no_lpips, total=total,
        sample_rate=preparation.decoding.sample_rate,
    )  # fmt: skip
    print(json.dumps(found.to_json(), indent=1) if request.json else "\n".join(found.lines()))
