"""The data of a training run: what its sources must be able to do, its buckets, what the scaling is measured on.

Legend: B batch, C image channels, R side of a crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ldm_vae.autoencoder.linear_code import PatchMoments, k_means, to_patches
from ldm_vae.autoencoder.linear_init import start_linear
from ldm_vae.autoencoder.model import downsampling_factor
from ldm_vae.core import distributed, rng
from ldm_vae.core.errors import UsageError
from ldm_vae.core.rng import seeded
from ldm_vae.data.buckets import Assignment, Shape, assign
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.quarantine import Bad
from ldm_vae.data.sizes import shared_sizes
from ldm_vae.data.source import Source, with_resize
from ldm_vae.data.stream import Stream
from ldm_vae.data.transforms import to_pixels
from ldm_vae.metrics.batches import image_batches, some_of
from ldm_vae.training.config import Training


def open_sources(settings: Training) -> tuple[Source | Stream, Source | None]:
    """The images to train and to validate on; whole ones are brought to the resolution as `transform.resize` says.

    Raises:
        UsageError: nothing is there.
    """
    resize, held_out = settings.transform.resize, settings.validation_data
    return (
        with_resize(settings.data.build(), resize),
        None if held_out is None else with_resize(held_out.build(), resize),
    )


def check_sources(source: Source | Stream, validation_source: Source | None, settings: Training) -> None:
    """Raises UsageError for what a source cannot do in this run, before anything is computed."""
    if settings.buckets is not None and isinstance(source, Stream):
        raise UsageError("buckets: need the size of every image beforehand, and data can only be read in order")
    if isinstance(validation_source, Stream):
        raise UsageError("validation_data: can only be read in order; expected a source with a length and an index")
    if validation_source is not None and validation_source.decoding.jpeg_draft:
        raise UsageError("validation_data.jpeg_draft: for training only; measured pixels are decoded exactly")


def assign_buckets(
    source: Source, shapes: Sequence[Shape], settings: Training, accelerator: Accelerator
) -> tuple[Assignment, list[Bad]]:
    """Which bucket each image trains in, the same on every rank; the images that this rank could not read."""
    sizes, unreadable = shared_sizes(
        source, settings.output_dir / "image_sizes.safetensors",
        rank=accelerator.process_index, world_size=accelerator.num_processes,
        add_up=lambda part: accelerator.reduce(part.to(accelerator.device), "sum"),
        num_workers=settings.dataloader_num_workers,
    )  # fmt: skip
    return assign(shapes, sizes), unreadable


def normalisation_pixels(settings: Training) -> Iterator[torch.Tensor]:
    """Training images [B, C, R, R] in [-1, 1], decoded exactly, as encoding will, whatever jpeg_draft says."""
    source = settings.data.model_copy(update={"jpeg_draft": False} if settings.data.jpeg_draft else {}).build()
    source = with_resize(source, settings.transform.resize)
    chosen = some_of(source, settings.normalisation_images)
    batches = image_batches(source, chosen, settings.resolution, batch_size=settings.train_batch_size)
    left = settings.normalisation_images
    for batch in batches:
        yield to_pixels(batch.pixels)
        left -= settings.train_batch_size
        if left <= 0:
            return


# --- init: linear -----------------------------------------------------------------------------------------------------

VECTORS = 32  # of each code that k-means sees


def start_from_data(vae: Any, source: Source | Stream, settings: Training, accelerator: Accelerator) -> None:
    """Set `vae`, fresh from the config, to the linear code of the first `init_images` crops of the training's stream:
    the same weights on every rank, for any number of processes.

    Raises:
        UsageError: the code or the network cannot be built; the field is named.
        WorkError: there is no usable image.
    """
    say = accelerator.print
    say(f"init: linear: fitting the linear code on {settings.init_images:,} training crops")
    codes = getattr(vae.config, "num_vq_embeddings", 0)
    moments, patches = _patches_of(vae, source, settings, accelerator, -(-VECTORS * codes // settings.init_images))
    with seeded(settings.seed):
        if codes:
            code = moments.code(int(vae.config.vq_embed_dim or vae.config.latent_channels))
            scale = code.deviations / code.deviations[0]  # k-means then weighs errors as the picture does
            start_linear(vae, code, scale)
            vae.quantize.embedding.weight.data.copy_(k_means(code.of_patches(patches) * scale, codes, settings.seed))
        else:
            start_linear(vae, moments.code(settings.model.latent_channels))
    # eigenvectors may differ in rounding between machines
    for parameter in vae.parameters():
        parameter.data.copy_(broadcast(parameter.data.to(accelerator.device)))


def _patches_of(
    vae: Any, source: Source | Stream, settings: Training, accelerator: Accelerator, kept: int
) -> tuple[PatchMoments, torch.Tensor]:
    """The moments of all patches of the crops, and `kept` patches of each crop [n, P], in the order of the stream."""
    ranks, wanted = accelerator.num_processes, settings.init_images
    loader = training_loader(
        source, settings.transform, settings.resolution, seed=settings.seed, batch_size=settings.train_batch_size,
        rank=accelerator.process_index, world_size=ranks, num_workers=settings.dataloader_num_workers,
    )  # fmt: skip
    moments = PatchMoments(downsampling_factor(vae), settings.model.in_channels, accelerator.device)
    patches = []
    for batch in itertools.islice(loader, -(-wanted // (settings.train_batch_size * ranks))):
        mine = batch.positions < wanted
        moments.update(batch.pixels[mine])
        if kept:
            rows = to_patches(batch.pixels, moments.factor).flatten(1, 2)  # [B, h w, P]
            places = keyed_places(settings.seed, batch.positions.tolist(), rows.shape[1], kept)
            rows = rows[torch.arange(len(rows))[:, None], places]
            gathered = accelerator.gather((rows.to(accelerator.device), mine.to(accelerator.device)))
            patches.append(gathered[0][gathered[1]].flatten(0, 1).cpu())
    moments.add_up(distributed.total)
    return moments, torch.cat(patches) if patches else torch.empty(0)


def keyed_places(seed: int, positions: Sequence[int], count: int, kept: int) -> torch.Tensor:
    """Of each position of the stream, `kept` of `count` places, at most all: [B, kept]."""
    drawn = [rng.generator(seed, "patches", position).permutation(count)[:kept] for position in positions]
    return torch.from_numpy(np.stack(drawn))
