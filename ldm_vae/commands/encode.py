"""`ldm-vae encode VAE DATA OUT`: encode a whole dataset once into a latent store."""

from __future__ import annotations

import argparse

from ldm_vae.data.flags import DataFlags, add_data_arguments

HELP = "write the latents of a dataset into a store"
DESCRIPTION = """\
Encode every image of DATA once into the latent store OUT (mean and logvar, so that a trainer draws new noise each
epoch). Stopped at any moment, the same command goes on; the number of processes may change and does not change a byte.

  ldm-vae encode my-vae photographs my-latents --resolution 256
  accelerate launch -m ldm_vae encode my-vae photographs my-latents --resolution 256     # several processes

VAE is a diffusers folder, a run folder, a hub id or a single file; DATA a folder of images, a dataset (parquet, arrow,
tar shards, hub id) or a list of files. Then:

  from ldm_vae import LatentDataset
  latents = LatentDataset("my-latents")[0]["latents"]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vae", metavar="VAE", help="diffusers folder, run folder, hub id or single file")
    parser.add_argument("data", metavar="DATA", help="images: folder, dataset, list file, zip, tar shards, hub id")
    parser.add_argument("out", metavar="OUT", help="folder of the store: new, or one to go on with")
    parser.add_argument(
        "--resolution", type=int, nargs="+", required=True, help="side of the crop in pixels; several, several shapes"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images per forward pass (default 16)")
    parser.add_argument("--shard_size", type=int, default=2048, help="images per shard and work unit (default 2048)")
    parser.add_argument(
        "--store",
        choices=("moments", "mean", "sample", "indices"),
        help="mean and logvar (default), the mean alone, one sample, or the indices of a VQModel's codes (its default)",
    )
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32", "bf16"), help="how values are stored (fp16; indices: integers)"
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="how the encoder computes (no: fp32)"
    )
    parser.add_argument(
        "--views",
        choices=("centre", "flip", "five_crop", "ten_crop"),
        default="centre",
        help="what is encoded of each image: the centre, also its mirror image, the corners, all ten",
    )
    parser.add_argument(
        "--bucket_step",
        type=int,
        metavar="N",
        help="aspect buckets: crops of about RESOLUTION x RESOLUTION pixels with sides in steps of N (64 is usual)",
    )
    parser.add_argument("--tile", type=int, metavar="N", help="encode larger crops in tiles of N pixels")
    parser.add_argument("--tile_overlap", type=int, metavar="N", help="overlap of tiles (default: a quarter of a tile)")
    parser.add_argument("--pixels", action="store_true", help="store the crops too, to train a decoder from the store")
    parser.add_argument(
        "--update", action="store_true", help="take up what was added to, changed in and removed from DATA since"
    )
    parser.add_argument("--retry_quarantined", action="store_true", help="try the images again that were unusable")
    parser.add_argument(
        "--check",
        choices=("doubt", "contents", "size"),
        default="doubt",
        help="images encoded before that are read, to see that they are still the same: in doubt (their file is not as "
        "it was last seen), all, or only where their size does not tell",
    )
    parser.add_argument("--num_workers", type=int, help="decoding processes (default: the cores, at most 8)")
    parser.add_argument(
        "--encode_threads",
        type=int,
        help="batches encoded at the same time (default: on a CPU the cores of this process, on a GPU 2)",
    )
    parser.add_argument("--max_bad", type=float, default=1.0, help="share of unusable images above which it fails")
    parser.add_argument("--config", metavar="FOLDER", help="for a single-file VAE: folder with its config.json")
    parser.add_argument(
        "--jpeg_draft",
        action="store_true",
        help="decode a JPEG smaller where that is enough: faster, some 50 dB off; part of the store's identity",
    )
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.autoencoder.model import downsampling_factor, load_autoencoder
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.launch import ON_THEIR_OWN, build_accelerator
    from ldm_vae.data.preparation import preparation_of
    from ldm_vae.latent_store import write_store
    from ldm_vae.latent_store.maintain.rounding_error import describe_costs, measure_costs
    from ldm_vae.latent_store.maintain.summary import describe, units_in
    from ldm_vae.latent_store.write.encoder import default_threads, default_workers
    from ldm_vae.latent_store.write.tiled_encode import tile_of
    from ldm_vae.latent_store.write.writer import Processes

    if not 0 <= arguments.max_bad <= 1:
        raise UsageError(f"--max_bad: expected a share between 0 and 1, got {arguments.max_bad}")
    accelerator = build_accelerator(arguments.mixed_precision, ddp_timeout=ON_THEIR_OWN)
    vae = load_autoencoder(arguments.vae, arguments.config)
    preparation = preparation_of({arguments.vae: vae}, DataFlags.of(arguments))
    source = preparation.open(arguments.data)
    processes, device = accelerator.num_processes, accelerator.device
    before = units_in(arguments.out)
    manifest = write_store(
        vae,
        source,
        arguments.out,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        store=arguments.store,
        dtype=arguments.dtype,
        mixed_precision=arguments.mixed_precision,
        views=arguments.views,
        bucket_step=arguments.bucket_step,
        tile=tile_of(arguments.tile, arguments.tile_overlap, downsampling_factor(vae)),
        pixels=arguments.pixels,
        update=arguments.update,
        retry_quarantined=arguments.retry_quarantined,
        check=arguments.check,
        num_workers=default_workers(processes) if arguments.num_workers is None else arguments.num_workers,
        encode_threads=default_threads(processes, device)
        if arguments.encode_threads is None
        else arguments.encode_threads,
        max_bad=arguments.max_bad,
        processes=Processes(accelerator.process_index, processes, accelerator.wait_for_everyone),
        device=device,
        source_name=arguments.data,
        vae_name=arguments.vae,
    )
    if accelerator.is_main_process:
        print("\n".join([describe(arguments.out, manifest), *preparation.notes]))
        if manifest.units > before:
            print(describe_costs(measure_costs(Path(arguments.out), manifest, vae, source)))
    accelerator.end_training()
