"""The data of a training run: what its sources must be able to do, its buckets, what the scaling is measured on.

Legend: B batch, C image channels, R side of a crop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

from ldm_vae.data.buckets import Assignment, Shape, assign
from ldm_vae.data.quarantine import Bad
from ldm_vae.data.sizes import shared_sizes
from ldm_vae.data.source import Source, with_resize
from ldm_vae.data.stream import Stream
from ldm_vae.data.transforms import to_pixels
from ldm_vae.errors import UsageError
from ldm_vae.metrics.batches import image_batches, some_of
from ldm_vae.training import Training


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
