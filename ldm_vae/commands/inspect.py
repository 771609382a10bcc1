"""`ldm-vae inspect DATA`: survey the images of a source before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core.paths import expanded
from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, data_flags

HELP = "summarise a dataset: sizes, formats, broken files, captions, buckets, thumbnails"
DESCRIPTION = """\
Decode the images of DATA and print their number, sizes, shapes and formats, broken files with reasons, captions and the
resulting aspect buckets. Write ten thumbnails as one image.

  ldm-vae inspect photographs
  ldm-vae inspect "shards/{000..099}.tar" --caption_column json.caption --resolution 1024
  ldm-vae inspect owner/name --split validation --thumbnails look.png
  ldm-vae inspect films --frames 17             # of videos also frames, rates, durations, and what is ignored
  ldm-vae inspect music --sample_rate 24000     # of sounds seconds, rates, channels and levels

DATA is a folder of images, a zip, a list file (.txt), parquet or arrow files, a folder written by datasets'
save_to_disk, tar shards (file, folder, glob, {000..099} or URL) or a dataset of the hub. With --frames it may hold
videos, with --sample_rate it holds sounds.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    data: str = argument("DATA", "folder, zip, list file, dataset, tar shards or hub id")
    resolution: int | None = flag("side of the intended crops (256)")
    bucket_step: int | None = flag("sides of aspect buckets in steps of N (resolution / 16)", metavar="N")
    max_images: int = flag("number of images to decode (10000; 0: all)", 10000, metavar="N")
    num_workers: int = flag("decoding processes (2)", 2)
    thumbnails: Path | None = flag("file for the thumbnails (inspect.png, unless that lies in DATA)", metavar="PNG")
    flags: DataFlags = data_flags(resize=False, recorded=None)


def run(request: Request) -> None:
    from ldm_vae.autoencoder.preparation import plain
    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.data import buckets
    from ldm_vae.data.stream import Stream
    from ldm_vae.data.survey import lines, survey, thumbnails

    resolution = 256 if request.resolution is None else request.resolution
    for name, least in (("resolution", 1), ("max_images", 0), ("num_workers", 0)):
        if (value := resolution if name == "resolution" else getattr(request, name)) < least:
            raise UsageError(f"{name}: expected at least {least}, got {value}")
    place, data = request.thumbnails or Path("inspect.png"), expanded(request.data)
    if not place.parent.is_dir():
        raise UsageError(f"thumbnails {place}: there is no folder {place.parent}")
    of_sounds = request.flags.sample_rate is not None
    if request.thumbnails and of_sounds:
        raise UsageError("thumbnails: are of images; `ldm-vae evaluate` makes a page that plays sounds")
    for name in ("resolution", "bucket_step"):
        if of_sounds and getattr(request, name) is not None:
            raise UsageError(f"{name}: is of images; expected none beside --sample_rate, which is of sounds")
    within = data.is_dir() and place.resolve().is_relative_to(data.resolve())
    if request.thumbnails and within:
        raise UsageError(f"thumbnails {place}: expected a place outside DATA, of which it would become an image")
    # 64 is usual at 1024 px; a smaller resolution needs finer steps for the same shapes, a VAE multiples of 8
    step = request.bucket_step or max(8, resolution // 16 // 8 * 8)
    shapes = buckets.generate(resolution**2, step)
    source = plain(request.flags).open(request.data, whole=True)
    found = survey(source, request.max_images or None, request.num_workers)
    print("\n".join(lines(found, resolution, shapes)))
    if not found.good:
        reason = f": {found.bad[0].reason}" if found.bad else ""
        raise WorkError(f"data {request.data}: no usable {'sound' if of_sounds else 'image'}{reason}")
    if of_sounds:
        return
    if isinstance(source, Stream):
        print("\nread in order: length unknown, no thumbnails; training works, encoding needs it downloaded")
    elif within:
        print(f"\nno thumbnails: {place} would become an image of DATA; --thumbnails names a place outside it")
    else:
        print(f"\n{thumbnails(source, found, place)} of them: {place}")
