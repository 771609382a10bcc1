"""The data of a training run: its sources, its feed of batches, and the start from the linear code.

Legend: B batch, C image channels, R side of a crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ldm_vae.autoencoder.codebooks import ResidualCodebooks, beside, nearest
from ldm_vae.autoencoder.geometry import downsampling_factor, image_channels, latent_channels, step_of
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.autoencoder.linear_code import PatchMoments, k_means, to_patches
from ldm_vae.autoencoder.linear_init import start_linear
from ldm_vae.autoencoder.linear_sounds import start_sounds
from ldm_vae.autoencoder.preparation import shown
from ldm_vae.core import distributed, rng
from ldm_vae.core.errors import UsageError
from ldm_vae.core.rng import seeded
from ldm_vae.data.buckets import Assignment, Shape, assign, of_clips
from ldm_vae.data.dataset import Batch, training_loader
from ldm_vae.data.holdout import Subset
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.data.quarantine import Bad, Quarantine
from ldm_vae.data.sizes import shared_sizes
from ldm_vae.data.source import Source, with_resize
from ldm_vae.data.stream import Stream
from ldm_vae.data.windows import windows
from ldm_vae.run.inputs import compare_images
from ldm_vae.training.config import Training
from ldm_vae.training.holdout import split


def open_sources(settings: Training, accelerator: Accelerator) -> tuple[Source | Stream, Source | None]:
    """The images to train and to validate on; whole ones are brought to the resolution as `transform.resize` says.

    Raises:
        UsageError: nothing is there, or a source cannot do what this run asks of it.
    """
    resize, held_out = settings.transform.resize, settings.validation_data
    source = with_resize(settings.data.build(), resize)
    if settings.holdout is not None:
        train, validated = split(settings, source, accelerator)
        validated.decoding = replace(validated.decoding, jpeg_draft=False)  # measured pixels are decoded exactly
        return train, windows(validated)
    validation_source = None if held_out is None else windows(with_resize(held_out.build(), resize))
    _check_sources(source, validation_source, settings)
    return source, validation_source


def _check_sources(source: Source | Stream, validation_source: Source | None, settings: Training) -> None:
    if settings.buckets is not None and isinstance(source, Stream):
        raise UsageError("buckets: need the size of every image beforehand, and data can only be read in order")
    if isinstance(validation_source, Stream):
        raise UsageError("validation_data: can only be read in order; expected a source with a length and an index")
    if validation_source is not None and validation_source.decoding.jpeg_draft:
        raise UsageError("validation_data.jpeg_draft: for training only; measured pixels are decoded exactly")


def check_signal(settings: Training, prepared: Preprocessing) -> None:
    """Raises UsageError where `data.alpha`, `data.frames`, `data.sample_rate` or `data.samples` is not what the images
    have: those of a latent store, or of a source of somebody's own."""
    for name, default in (("alpha", False), ("frames", None), ("sample_rate", None), ("samples", None)):
        came, ours = getattr(prepared.decoding, name), getattr(settings.data, name, default)
        if came != ours:
            raise UsageError(f"data.{name}: expected {shown(came)}, as the images are decoded, got {shown(ours)}")


def layout_of(settings: Training, accelerator: Accelerator, images_seen: int) -> dict[str, Any]:
    """Layout of this rank's part of the stream: batch, rank, start and workers, as the loaders take them."""
    return {
        "seed": settings.seed, "batch_size": settings.train_batch_size, "rank": accelerator.process_index,
        "world_size": accelerator.num_processes, "start_position": images_seen,
        "num_workers": settings.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda",
    }  # fmt: skip


class ImageFeed:
    """Batches of images, cropped anew in each epoch, all of one shape or of one bucket each.

    Args:
        vae: what is trained on them.
    """

    def __init__(self, settings: Training, vae: Any, source: Source | Stream) -> None:
        self.settings, self.source = settings, source
        self._shapes = settings.buckets and settings.buckets.choose(settings.resolution, step_of(vae))
        frames = source.decoding.frames
        if frames is not None and not isinstance(source, Stream):
            # images among videos have a bucket of their own, and what is too short is known before the first step
            side = settings.resolution
            self._shapes = of_clips(self._shapes or [(side, side)], frames)

    @property
    def prepared(self) -> Preprocessing:
        """Record of the images' decoding."""
        holdout = self.source.holdout if isinstance(self.source, Subset) else None
        return Preprocessing.of(self.source.decoding, holdout)

    def compare(self, accelerator: Accelerator, *, resumed: bool) -> None:
        """Say whether the images are others than those that the run began with."""
        compare_images(self.settings.output_dir, "data", self.source, accelerator, resumed=resumed)

    def batches(self, accelerator: Accelerator, images_seen: int, quarantine: Quarantine) -> Iterator[Batch]:
        """The endless stream of this rank's batches, from `images_seen` on, in an order that the seed decides; images
        whose size cannot be read go to the quarantine."""
        assignment, settings = None, self.settings
        if self._shapes:
            assert not isinstance(self.source, Stream)
            assignment, unreadable = self._assign(self.source, self._shapes, accelerator)
            quarantine.add(unreadable)
            readable = f"{sum(assignment.counts()):,} of {len(self.source):,} images"
            told = "height x width" if self.source.decoding.frames is None else "frames x height x width"
            accelerator.print(f"aspect buckets ({told}) of {readable}:", *assignment.lines(), sep="\n")
            filled = [shape for shape, count in zip(assignment.shapes, assignment.counts(), strict=True) if count]
            if (frames := self.source.decoding.frames or 1) > 1 and all(shape[0] == 1 for shape in filled):
                raise UsageError(
                    f"data.frames: {frames}, and none of {len(self.source):,} files is a video of so many frames; for "
                    "images alone leave it out"
                )
        layout = layout_of(settings, accelerator, images_seen)
        return training_loader(self.source, settings.transform, settings.resolution, buckets=assignment, **layout)

    def _assign(
        self, source: Source, shapes: Sequence[Shape], accelerator: Accelerator
    ) -> tuple[Assignment, list[Bad]]:
        """Bucket that each image trains in, the same on every rank; and the images that this rank could not read."""
        sizes, unreadable = shared_sizes(
            source, self.settings.output_dir / "image_sizes.safetensors",
            rank=accelerator.process_index, world_size=accelerator.num_processes,
            add_up=lambda part: accelerator.reduce(part.to(accelerator.device), "sum"),
            num_workers=self.settings.dataloader_num_workers,
        )  # fmt: skip
        found = assign(shapes, sizes)
        if accelerator.is_main_process:
            lost = np.flatnonzero((found.bucket < 0) & sizes.any(1)).tolist()
            unreadable += [Bad(source.key(at), f"{sizes[at, 0]} frames fill no bucket") for at in lost]
        return found, unreadable

    def complete(self, vae: Any) -> Any:
        """The whole VAE for validation and export: `vae` itself, which has all its parts."""
        return vae


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
    books = beside(vae)
    # projections of factorised codes are learned, and so are their codes
    residual = books if isinstance(books, ResidualCodebooks) and not books.into else None
    # only a codebook needs the patches themselves; a continuous code needs their moments alone
    codes = getattr(vae.config, "num_vq_embeddings", 0) if residual is None else residual.shape.codes
    moments, patches = _patches_of(vae, source, settings, accelerator, -(-VECTORS * codes // settings.init_images))
    start = start_linear if moments.axes == 2 else start_sounds
    with seeded(settings.seed):
        code = moments.code(latent_channels(vae))
        if codes:
            scale = code.deviations / code.deviations[0]  # k-means then weighs errors as the picture does
            start(vae, code, scale)
            rest = code.of_patches(patches) * scale
            rows = vae.quantize.embedding.weight.data[None] if residual is None else residual.rows.data
            for row in rows:  # each codebook of what those before it have left
                row.copy_(k_means(rest, codes, settings.seed))
                rest = rest - row.double()[nearest(rest, row)]
        else:
            start(vae, code)
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
    frames = 1 if source.decoding.frames is None else lengths_of(vae).joined or 1
    axes = 2 if settings.samples is None else 1
    moments = PatchMoments(downsampling_factor(vae), image_channels(vae), accelerator.device, frames, axes)
    patches = []
    for batch in itertools.islice(loader, -(-wanted // (settings.train_batch_size * ranks))):
        # the last batch may run beyond `init_images`, whose number must not depend on the ranks
        mine = batch.positions < wanted
        moments.update(batch.pixels[mine])
        if kept:
            rows = to_patches(batch.pixels, moments.factor, frames).flatten(1, -2)  # [B, h w, P]
            # keyed by position: the same patches for any number of processes
            places = keyed_places(settings.seed, batch.positions.tolist(), rows.shape[1], kept)
            rows = rows[torch.arange(len(rows))[:, None], places]
            gathered = accelerator.gather((rows.to(accelerator.device), mine.to(accelerator.device)))
            patches.append(gathered[0][gathered[1]].flatten(0, 1).cpu())
    moments.add_up(distributed.total)
    return moments, torch.cat(patches) if patches else torch.empty(0)


def keyed_places(seed: int, positions: Sequence[int], count: int, kept: int) -> torch.Tensor:
    """Draw for each position of the stream `kept` of `count` places, at most all: [B, kept]."""
    drawn = [rng.generator(seed, "patches", position).permutation(count)[:kept] for position in positions]
    return torch.from_numpy(np.stack(drawn))
