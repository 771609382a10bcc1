"""`ldm-vae inspect DATA`: survey the images of a source before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_vae.data.flags import DataFlags, add_data_arguments

HELP = "look at a dataset: sizes, formats, broken files, captions, buckets, thumbnails"
DESCRIPTION = """\
Decode the images of DATA and say what is there: how many, their sizes and shapes, formats, broken files with reasons,
captions, the aspect buckets they would get; ten of them as one picture.

  ldm-vae inspect photographs
  ldm-vae inspect "shards/{000..099}.tar" --caption_column json.caption --resolution 1024
  ldm-vae inspect owner/name --split validation --thumbnails look.png

DATA is a folder of images, a zip, a list file (.txt), parquet or arrow files, a folder written by datasets'
save_to_disk, tar shards (file, folder, glob, {000..099} or URL) or a dataset of the hub.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder, zip, list file, dataset, tar shards or hub id")
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops you have in mind (256)")
    parser.add_argument(
        "--bucket_step", type=int, metavar="N", help="sides of aspect buckets in steps of N (resolution / 16)"
    )
    parser.add_argument("--max_images", type=int, default=10_000, metavar="N", help="look at N of them (10000; 0: all)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode (2)")
    parser.add_argument("--thumbnails", type=Path, default=Path("inspect.png"), metavar="PNG", help="(inspect.png)")
    add_data_arguments(parser, resize=False, recorded=None)


def run(args: argparse.Namespace) -> None:
    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.data import buckets
    from ldm_vae.data.preparation import plain
    from ldm_vae.data.stream import Stream
    from ldm_vae.data.survey import lines, survey, thumbnails

    for name, least in (("resolution", 1), ("max_images", 0), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(args, name)}")
    if not args.thumbnails.parent.is_dir():
        raise UsageError(f"thumbnails {args.thumbnails}: there is no folder {args.thumbnails.parent}")
    # 64 is usual at 1024 px; a smaller resolution needs finer steps for the same shapes, a VAE multiples of 8
    step = args.bucket_step or max(8, args.resolution // 16 // 8 * 8)
    shapes = buckets.generate(args.resolution**2, step)
    source = plain(DataFlags.of(args)).open(args.data)
    found = survey(source, args.max_images or None, args.num_workers)
    print("\n".join(lines(found, args.resolution, shapes)))
    if not found.good:
        reason = f": {found.bad[0].reason}" if found.bad else ""
        raise WorkError(f"data {args.data}: no usable image{reason}")
    if isinstance(source, Stream):
        print("\nread in order: length unknown, no thumbnails; training works, encoding needs it downloaded")
    else:
        print(f"\n{thumbnails(source, found, args.thumbnails)} of them: {args.thumbnails}")
