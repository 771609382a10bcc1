"""Training on a latent store: the knobs that every such run has, and the store as it reads it.

The loops are train/diffusion.py and train/prior.py.

Legend: B batch, c latent channels, q codebooks, p latent positions: h w, of clips t h w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import NormalisationKind
from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError
from ldm_vae.latent_store.format.manifest import place_of, read_manifest
from ldm_vae.latent_store.read.batch import Item
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.latent_store.read.loader import LatentLoader
from ldm_vae.run.folder import MAY_CHANGE as ANY_RUN_MAY_CHANGE
from ldm_vae.run.folder import RunConfig
from ldm_vae.run.optim import OptimizerConfig


class StoreTraining(RunConfig):
    """Knobs of a run on a latent store."""

    latents: str
    """The latent store: a folder, or a URL."""
    vae: str | None = None
    """Decoder of the samples: a folder, a hub id, a single file or a run; default: the VAE that the store names."""
    label_column: str | None = None
    """The store's column that holds the class: any value, each its own class. Default: `label` where there is one."""
    conditional: bool = True
    """False leaves labels out."""
    view: str = ""
    """View of the store: "" the centre crop, flip, ..., or random, another one each epoch."""
    crop: int | None = Field(None, gt=0)
    """Train on random crops of so many latent positions a side instead of whole latents: for stores of few large
    images."""
    window: int | None = Field(None, gt=0)
    """Shuffle rows within so many shards: for a store that the disk does not hold; default: all of them."""
    lanes: int = Field(1, gt=0)
    """With a window, parts of each global batch that read shards of their own: as many as machines."""
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", betas=(0.9, 0.999), eps=1e-8)
    sample_every_images: int | None = Field(None, gt=0)
    """A grid of decoded samples in RUN/samples, of the averaged weights; there is one at the end in any case."""
    sample_images: int = Field(32, gt=0, le=2**16)
    """Pictures in a grid; the same noise each time."""


MAY_CHANGE = (*ANY_RUN_MAY_CHANGE, "vae", "sample_every_images", "sample_images")


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredSamples:
    """A store as a training reads it: latents of one `shape` (c, *p), or indices of codes (q, *p) of q codebooks, and
    the values that are its classes, with what pictures call them."""

    dataset: LatentDataset
    shape: tuple[int, ...]
    label_column: str | None
    classes: tuple[Any, ...]
    crop: int | None
    seed: int
    names: tuple[str, ...] = ()

    @property
    def none(self) -> int:
        """The label that stands for none."""
        return len(self.classes)

    def loader(self, settings: StoreTraining, accelerator: Accelerator) -> LatentLoader:
        """The exact order by key, this rank's part of each global batch; it is not for `accelerator.prepare`."""
        return self.dataset.loader(
            settings.train_batch_size, seed=settings.seed, window=settings.window, lanes=settings.lanes,
            num_workers=settings.dataloader_num_workers,
            rank=accelerator.process_index, world_size=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip

    def batches(self, loader: LatentLoader, images_seen: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        """(latents or indices [B, *shape], labels [B], the samples' positions in the global stream), for ever, from the
        loader's own place on, which is that of `images_seen`."""
        schedule = loader.schedule
        # the positions that this rank's images have in the global batch, by which noise and times are keyed
        start = images_seen + schedule.rank * schedule.batch_size
        while True:
            for batch in loader:
                latents, labels = self._of(batch)
                positions = list(range(start, start + len(latents)))
                yield self.cropped(latents, positions), labels, positions
                start += schedule.batch_size * schedule.world_size

    def _of(self, batch: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents or indices [B, *shape] but for the crop, labels [B]) of a batch of the dataset."""
        latents = batch["latents"] if "latents" in batch else batch["indices"]
        if not self.dataset.manifest.identity.axes:
            latents = latents[:, None]  # a VQModel's indices [B, *p] are of one codebook
        # an image without a label trains the unconditional model
        if self.label_column is None:
            return latents, torch.full((len(latents),), self.none)
        number_of = {value: number for number, value in enumerate(self.classes)}
        values = batch[self.label_column]
        values = values.tolist() if isinstance(values, torch.Tensor) else values
        return latents, torch.tensor([number_of.get(value, self.none) for value in values])

    def cropped(self, latents: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
        """latents or indices [B, ..., H, W] => [B, ..., h, w], each at a place drawn by its key."""
        if self.crop is None:
            return latents
        rows = []
        for latent, key in zip(latents, keys, strict=True):
            # by position in the stream: another place each epoch, the same after a resume
            draw = rng.generator(self.seed, "latent crop", key)
            top, left = (int(draw.integers(side - self.crop + 1)) for side in latent.shape[-2:])
            rows.append(latent[..., top : top + self.crop, left : left + self.crop])
        return torch.stack(rows)

    def some(self, count: int) -> Iterator[torch.Tensor]:
        """`count` latents [c, h, w] of the store, evenly spread, cropped as in training; some come twice if need be."""
        for key in range(count):
            yield self.cropped(self.dataset[self._spread(key, count)]["latents"][None], [key])[0]

    def at_most(self, count: int) -> int:
        """As many of `count` as are not the same: of whole latents those of the store, of crops all."""
        return count if self.crop is not None else min(count, len(self.dataset))

    def labelled(self, keys: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents or indices [B, *shape], labels [B]) of those `keys` among the `count` that `some` gives."""
        columns = () if self.label_column is None else (self.label_column,)
        indices = [self._spread(key, count) for key in keys]
        latents, labels = self._of(self.dataset.read(indices, [0] * len(indices), columns))
        return self.cropped(latents, keys), labels

    def _spread(self, key: int, count: int) -> int:
        return key * len(self.dataset) // count if count <= len(self.dataset) else key % len(self.dataset)

    def originals(self, count: int) -> torch.Tensor:
        """`count` latents [count, c, h, w] to show beside as many samples: every class in turn, cropped as in training;
        some come twice if need be."""
        if not self.classes or self.label_column is None:
            return self.labelled(range(count), count)[0]
        columns = (self.label_column,)
        rows: dict[Any, list[int]] = {value: [] for value in self.classes}
        for index, value in enumerate(self.dataset.column(self.label_column)):
            if value is not None and len(rows[value]) * len(self.classes) < count:
                rows[value].append(index)
        turns = [(key // len(self.classes), rows[self.classes[key % len(self.classes)]]) for key in range(count)]
        found, _ = self._of(self.dataset.read([own[turn % len(own)] for turn, own in turns], [0] * count, columns))
        return self.cropped(found, range(count))


def open_samples(settings: StoreTraining, normalisation: NormalisationKind | None = None) -> StoredSamples:
    """The store of the config.

    Raises:
        UsageError: there is none, it holds several shapes, or has no such column, view or crop.
    """
    manifest = read_manifest(place_of(settings.latents))
    column = settings.label_column if settings.conditional else None
    if column is None and settings.conditional and "label" in manifest.columns:
        column = "label"
    if column is not None and column not in manifest.columns:
        raise UsageError(f"label_column: the store has no {column}; it has {', '.join(manifest.columns)}")
    dataset = LatentDataset(
        settings.latents, seed=settings.seed, view=settings.view, normalisation=normalisation,
        columns=() if column is None else (column,),
    )  # fmt: skip
    shapes = list(dataset.shapes())
    if len(shapes) != 1:
        listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise UsageError(f"latents {settings.latents}: expected one latent shape, it holds {listed}")
    # a VQModel's indices are of one codebook
    shape = shapes[0] if manifest.identity.axes else (1, *shapes[0])
    if settings.crop is not None:
        least = min(shape[-2:])
        if settings.crop > least:
            raise UsageError(f"crop: expected at most {least}, the side of the latents, got {settings.crop}")
        shape = (*shape[:-2], settings.crop, settings.crop)
    values = [] if column is None else dataset.column(column)
    classes = tuple(sorted({value for value in values if value is not None}))
    names = _names(dataset, column, values, classes)
    return StoredSamples(dataset, shape, column, classes, settings.crop, settings.seed, names)


def _names(
    dataset: LatentDataset, column: str | None, values: Sequence[Any], classes: Sequence[Any]
) -> tuple[str, ...]:
    """Names of the classes in pictures: of a number its folder, of an image's key its file, where no two are
    the same; else the value."""
    if column == "label" and "label_name" in dataset.manifest.columns:
        known = dict(zip(values, dataset.column("label_name"), strict=True))
        return tuple(str(known[value]) for value in classes)
    stems = tuple(PurePosixPath(str(value)).stem for value in classes)
    return stems if column == "key" and len({*stems}) == len(stems) else tuple(map(str, classes))


def load_decoder(settings: StoreTraining, latents: StoredSamples) -> Any:
    """The VAE that decodes samples.

    Raises:
        UsageError: it is not there, or its encoder did not make the store.
    """
    manifest = latents.dataset.manifest
    name = settings.vae or manifest.recorded.vae
    if not name:  # of a store that `write_store` was not told a name for
        raise UsageError(f"vae: {settings.latents} does not name the VAE that made it; expected its folder or hub id")
    try:
        vae = load_autoencoder(name)
    except UsageError as error:
        if settings.vae is not None:
            raise
        raise UsageError(f"vae: the store was made with {name}, which is not found from here ({error})") from error
    # a decoder of other latents would draw noise without a word
    if encoder_fingerprint(vae) != manifest.identity.encoder:
        raise UsageError(f"vae {name}: its encoder is not the one that made {settings.latents}")
    return vae
