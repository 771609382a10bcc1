"""`ldm-vae encode VAE DATA OUT`: encode a whole dataset once into a latent store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, data_flags
from ldm_vae.run.selection import checkpoint_flag

HELP = "write the latents of a dataset into a store"
DESCRIPTION = """\
Encode every image, clip or sound of DATA once into the latent store OUT (mean and logvar, so that a trainer draws new
noise each epoch). The command can be stopped at any time; repeat it to resume. The result does not depend on the number
of processes, which may change on resume.

  ldm-vae encode my-vae photographs my-latents --resolution 256
  accelerate launch -m ldm_vae encode my-vae photographs my-latents --resolution 256     # several processes
  ldm-vae encode my-vae photographs my-latents --resolution 256 --job_part 3/16          # a task of an array job
  ldm-vae encode my-vae photographs my-latents --resolution 256 --engine ray           # on a Ray cluster
  ldm-vae encode my-audio-vae music my-latents --excerpt 65536                         # excerpts of sounds

VAE is a diffusers folder, a run folder, a hub id or a single file; DATA is a folder of images, a dataset (parquet,
arrow, tar shards, hub id) or a list of files. To read the store:

  from ldm_vae import LatentDataset
  latents = LatentDataset("my-latents")[0]["latents"]
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    vae: str = argument("VAE", "diffusers folder, run folder, hub id or single file")
    data: str = argument("DATA", "images: folder, dataset, list file, zip, tar shards, hub id, or a URL")
    out: str = argument("OUT", "folder of the store, or a URL of an object store: new, or one to resume or update")
    resolution: tuple[int, ...] | None = flag(
        "side of the crop in pixels (default: the VAE's sample_size); several values give several shapes", nargs="+"
    )
    batch_size: int = flag("images per forward pass (default 16)", 16)
    shard_size: int = flag("images per shard and work unit (default 2048)", 2048)
    store: Literal["moments", "mean", "sample", "indices"] | None = flag(
        "stored values: mean and logvar (default), only the mean, one sample, or a VQModel's code indices (its default)"
    )
    dtype: Literal["fp16", "fp32", "bf16"] | None = flag("dtype of stored values (default fp16; indices: integers)")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("precision of the encoder (no: fp32)", "no")
    views: Literal["centre", "flip", "five_crop", "ten_crop"] = flag(
        "encoded crops of each image: the centre, also its mirror image, the corners, or all ten", "centre"
    )
    bucket_step: int | None = flag(
        "aspect buckets: crops of about RESOLUTION x RESOLUTION pixels with sides in steps of N (64 is usual)",
        metavar="N",
    )
    tile: int | None = flag("encode crops larger than N pixels in tiles of N pixels", metavar="N")
    tile_overlap: int | None = flag("overlap of tiles (default: a quarter of a tile)", metavar="N")
    pixels: bool = flag("also store the crops, to train a decoder from the store", False)
    pipelines: Literal["bria_fibo2", "ernie_image", "ideogram4"] | None = flag(
        "diffusion pipelines that the latents are for, where they read the normalisation of an AutoencoderKLFlux2 in "
        "another way than FLUX.2"
    )
    job_part: str | None = flag(
        "encode part I of N alone, beside launches of the other parts on any machines, as tasks of an array job; the "
        "one that ends last finishes the store",
        metavar="I/N",
    )
    engine: Literal["ray"] | None = flag(
        "encode by the processes of a Ray cluster, which see VAE, DATA and OUT under the same names"
    )
    ray_address: str | None = flag(
        "cluster: HOST:PORT, auto or local (default: RAY_ADDRESS, else the cluster of this machine, else one started "
        "here)",
        metavar="ADDRESS",
    )
    actors: int | None = flag("processes on the cluster (default: as many as it has room for now)", metavar="N")
    actor_gpus: float | None = flag("GPUs of each, also a share of one (default: 1 where the cluster has any)")
    update: bool = flag("apply additions, changes and removals in DATA since the last encode", False)
    retry_quarantined: bool = flag("retry quarantined images", False)
    check: Literal["doubt", "contents", "size"] = flag(
        "which encoded images are read again and compared: those whose file stat values changed (doubt), all "
        "(contents), or only those whose size cannot decide (size)",
        "doubt",
    )
    num_workers: int | None = flag("decoding processes (default: number of cores, at most 8)")
    encode_threads: int | None = flag(
        "batches encoded concurrently (default: on a CPU the cores of this process, on a GPU 2)"
    )
    max_bad: float = flag("share of unusable images above which encoding fails", 1.0)
    config: str | None = flag("for a single-file VAE: folder with its config.json", metavar="FOLDER")
    checkpoint: str | None = checkpoint_flag()
    jpeg_draft: bool = flag(
        "decode JPEGs at reduced size if sufficient: faster, differs at about 50 dB; part of the store's identity",
        False,
    )
    flags: DataFlags = data_flags()


def run(request: Request) -> None:
    import contextlib

    from ldm_vae.autoencoder.geometry import downsampling_factor, resolution_of
    from ldm_vae.core.errors import UsageError, resumable
    from ldm_vae.core.launch import ON_THEIR_OWN, build_accelerator
    from ldm_vae.core.ownership import Part
    from ldm_vae.latent_store import write_store
    from ldm_vae.latent_store.format.manifest import place_of
    from ldm_vae.latent_store.maintain.rounding_error import describe_costs, measure_costs
    from ldm_vae.latent_store.maintain.summary import describe, units_in
    from ldm_vae.latent_store.write.encoder import default_threads, default_workers
    from ldm_vae.latent_store.write.processes import Engine, Processes
    from ldm_vae.latent_store.write.ray_actor import Inputs
    from ldm_vae.latent_store.write.ray_engine import ray_engine
    from ldm_vae.latent_store.write.tiled_encode import tile_of
    from ldm_vae.run.selection import at_checkpoint
    from ldm_vae.training.scaling import measure_checkpoint

    if not 0 <= request.max_bad <= 1:
        raise UsageError(f"--max_bad: expected a share between 0 and 1, got {request.max_bad}")
    part = Part.parse(request.job_part or "1/1", "--job_part")
    # the driver of an engine does not encode: its machine need not have what the precision takes
    accelerator = build_accelerator("no" if request.engine else request.mixed_precision, ddp_timeout=ON_THEIR_OWN)
    _check_engine(request, accelerator.num_processes)
    name = at_checkpoint(request.vae, request.checkpoint)
    inputs = Inputs(name, request.data, request.config, request.flags)
    vae, preparation, source = inputs.open()
    of_sounds = source.decoding.signal == "audio"
    if of_sounds and (request.resolution is not None or source.decoding.samples is None):
        raise UsageError("--excerpt: expected the samples of an excerpt of a sound, and no --resolution")
    size = source.decoding.samples or request.resolution or resolution_of(None, vae, name)
    processes, device = accelerator.num_processes, accelerator.device
    measure_checkpoint(vae.to(device), name)
    before = units_in(request.out)
    threads = default_threads(processes, device) if request.encode_threads is None else request.encode_threads
    cluster: contextlib.AbstractContextManager[Engine | None] = contextlib.nullcontext()
    if request.engine:
        cluster = ray_engine(
            inputs, request.ray_address, request.actors, request.actor_gpus, request.num_workers, request.encode_threads
        )
    with resumable(f"finished shards are kept in {request.out}; the same command goes on"), cluster as engine:
        manifest = write_store(
            vae,
            source,
            place_of(request.out),
            resolution=size,
            batch_size=request.batch_size,
            shard_size=request.shard_size,
            store=request.store,
            dtype=request.dtype,
            mixed_precision=request.mixed_precision,
            views=request.views,
            bucket_step=request.bucket_step,
            tile=tile_of(request.tile, request.tile_overlap, downsampling_factor(vae)),
            pixels=request.pixels,
            pipelines=request.pipelines,
            update=request.update,
            retry_quarantined=request.retry_quarantined,
            check=request.check,
            num_workers=default_workers(processes) if request.num_workers is None else request.num_workers,
            encode_threads=threads,
            max_bad=request.max_bad,
            processes=Processes(accelerator.process_index, processes, accelerator.wait_for_everyone, part, engine),
            device=device,
            source_name=request.data,
            vae_name=name,
        )
    if accelerator.is_main_process and not manifest.complete:
        print(f"part {part} of {request.out} is done; the store is finished by the part that ends last")
    elif accelerator.is_main_process:
        print("\n".join([describe(request.out, manifest), *preparation.notes]))
        if manifest.units > before:
            print(describe_costs(measure_costs(place_of(request.out), manifest, vae, source)))
    accelerator.end_training()


def _check_engine(request: Request, processes: int) -> None:
    from ldm_vae.core.errors import UsageError

    own = {"--ray_address": request.ray_address, "--actors": request.actors, "--actor_gpus": request.actor_gpus}
    given = [name for name, value in own.items() if value is not None]
    if request.engine is None and given:
        raise UsageError(f"{given[0]}: is of --engine ray; expected both or neither")
    if request.engine and processes > 1:
        raise UsageError(f"--engine ray: expected one process, whose actors encode, got a launch of {processes}")
    if request.actors is not None and request.actors < 1:
        raise UsageError(f"--actors: expected at least 1, got {request.actors}")
    gpus = request.actor_gpus or 0.0
    if not (0 <= gpus <= 1 or gpus.is_integer()):
        raise UsageError(f"--actor_gpus: expected a share between 0 and 1, or a whole number, got {gpus:g}")
