"""`ldm-vae drift BASE TUNED DATA`: measure whether a frozen diffusion model can go on with the fine-tuned VAE."""

from __future__ import annotations

import argparse
import sys

from ldm_vae.data.flags import DataFlags, add_data_arguments

HELP = "compare a fine-tuned VAE with its base: is a diffusion model of the base still right?"
DESCRIPTION = """\
  ldm-vae drift sd-vae my-vae photographs --resolution 256

Latents against latents (cosine, RMS, shift and scale per channel), all four ways of encoding with one and decoding with
the other (PSNR, LPIPS), and a verdict in a sentence.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the VAE that the diffusion model was trained with")
    parser.add_argument("tuned", metavar="TUNED", help="the VAE that shall take its place")
    parser.add_argument("data", metavar="DATA", help="images: folder, dataset, list file, zip, tar shards, hub id")
    parser.add_argument("--resolution", type=int, help="side of the centre crop (default: BASE's sample_size)")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images, spread over DATA (default 64)")
    parser.add_argument("--batch_size", type=int, default=8, help="images per forward pass (default 8)")
    parser.add_argument("--no_lpips", action="store_true", help="PSNR only: no network weights are needed")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    import json

    import torch

    from ldm_vae.autoencoder.model import (
        check_resolution,
        downsampling_factor,
        load_autoencoder,
        sample_size,
    )
    from ldm_vae.data.preparation import preparation_of
    from ldm_vae.export.drift import measure_drift
    from ldm_vae.metrics.batches import image_batches, spread

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tuned = (load_autoencoder(vae).to(device) for vae in (arguments.base, arguments.tuned))
    resolution = arguments.resolution or sample_size(base)
    check_resolution(resolution, downsampling_factor(base))
    preparation = preparation_of({arguments.base: base, arguments.tuned: tuned}, DataFlags.of(arguments))
    for note in preparation.notes:
        print(note, file=sys.stderr)
    source = preparation.open(arguments.data)
    chosen = spread(len(source), arguments.images)
    batches = image_batches(source, chosen, resolution, batch_size=arguments.batch_size)
    total = -(-len(chosen) // arguments.batch_size)
    found = measure_drift(base, tuned, batches, resolution=resolution, lpips=not arguments.no_lpips, total=total)
    print(json.dumps(found.to_json(), indent=1) if arguments.json else "\n".join(found.lines()))
