"""Decoder-only training from a latent store: batches of stored moments and the pixels that they were made from.

The encoder is not run and not held. Pixels come from the store (`encode --pixels`), or are read again from the images:
by key, cut as the store cut them, the checksum of their bytes compared.

Legend: B batch, C image channels, c latent channels, T frames, H W pixels, L samples, n t h w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from ldm_vae.autoencoder.fine_tuning import encoder_parts
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import record
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import clips, sampler
from ldm_vae.data.dataset import MOST_BAD_IN_A_ROW
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.data.quarantine import Bad, BadImage, Quarantine
from ldm_vae.data.sampler import Work
from ldm_vae.data.source import Source, image_checksum
from ldm_vae.data.stream import Stream
from ldm_vae.data.transforms import decoding_of, preprocessing_identity
from ldm_vae.data.windows import windows
from ldm_vae.data.workers import load
from ldm_vae.latent_store.format.layout import (
    PIXELS,
    TENSOR_NAMES,
    crop_of,
    crops_of,
    is_flipped,
)
from ldm_vae.latent_store.format.manifest import read_manifest
from ldm_vae.latent_store.format.work_units import storable
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.latent_store.write.crops import Cutting, decoding_of_store
from ldm_vae.run.inputs import compare_images, compare_store
from ldm_vae.training.config import Training
from ldm_vae.training.data import layout_of

COLUMNS = ("key", "source_index", "image_sha256")


@dataclass
class StoredBatch:
    """One rank's part of a global batch: moments [B, c, h, w], of clips [B, c, t, h, w], of sounds [B, c, n], pixels
    uint8 [B, C, H, W] or [B, C, T, H, W], or samples float32 [B, C, L], that they belong to, positions in the stream of
    all images int64 [B], keys, and the images that could not be read again on the way."""

    moments: Moments
    pixels: torch.Tensor
    positions: torch.Tensor
    keys: list[str]
    bad: list[Bad]

    def moments_on(self, device: torch.device) -> Moments:
        """The moments, moved to the networks' device."""
        return self.moments.to(device)

    def pin_memory(self) -> StoredBatch:
        """Pin the pixels, for DataLoader; nothing else is worth page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())


class StoredPairs(Dataset[StoredBatch]):
    """Work => batches, in the worker. `source` is None where the store holds the pixels."""

    def __init__(self, latents: LatentDataset, source: Source | None) -> None:
        identity = latents.manifest.identity
        self.make = Moments if identity.store == "moments" else Moments.point
        self.latents, self.source = latents, source
        self.crops = crops_of(identity.views)
        made = decoding_of_store(identity)
        self.cutting = Cutting((latents.shards[0].resolution,), self.crops, None, made.resize, made.alpha)
        # by index, per worker: a bad image is read and reported once
        self._known_bad: set[int] = set()
        self._places: dict[str, int] | None = None

    def __getitems__(self, work: Work) -> StoredBatch:
        bad: list[Bad] = []
        # images first: a sample whose image is gone is replaced before its latents are read
        found = [self._usable(task.index, task.epoch, bad) for task in work.tasks]
        batch = self.latents.read([index for index, _ in found], [task.epoch for task in work.tasks], ("key",))
        pixels = batch[PIXELS] if self.source is None else torch.stack([crop for _, crop in found if crop is not None])
        positions = torch.tensor([task.position for task in work.tasks])
        moments = self.make(*(batch[name] for name in TENSOR_NAMES[self.latents.manifest.identity.store]))
        return StoredBatch(moments, pixels, positions, batch["key"], bad)

    def _usable(self, index: int, epoch: int, bad: list[Bad]) -> tuple[int, torch.Tensor | None]:
        """This sample, or the next whose image can still be had; its pixels where the store does not hold them."""
        if self.source is None:
            return index, None
        count = len(self.latents)
        # the next sample stands in, whatever the process or worker, so the batch stays the same everywhere
        for candidate in ((index + step) % count for step in range(min(count, MOST_BAD_IN_A_ROW))):
            if candidate in self._known_bad:
                continue
            row = self.latents.row(candidate, COLUMNS)
            try:
                return candidate, self._pixels(candidate, epoch, row)
            except BadImage as error:
                self._known_bad.add(candidate)
                bad.append(Bad(row["key"], error.reason))
        raise WorkError(
            f"latent_store {self.latents.path}: none of its images can be read again; first: {bad[0].reason}"
        )

    def _pixels(self, index: int, epoch: int, row: dict[str, Any]) -> torch.Tensor:
        assert self.source is not None
        record = self.source[self._place(row["key"], row["source_index"])]
        # pixels of another image would train the decoder to undo latents that do not belong to them
        if image_checksum(record.image) != row["image_sha256"]:
            raise BadImage("the image has changed since it was encoded; `ldm-vae encode --update` takes it up")
        crops, _ = clips.crops_of(record.image, self.source.decoding, self.cutting, at_least=self.cutting.at_least)
        # the same keyed draw as `read` makes for the moments: crop and latents are of one view
        (view,) = self.latents.views([index], [epoch])
        crop = crops[self.crops.index(crop_of(view))].pixels
        return crop.flip(-1) if is_flipped(view) else crop

    def _place(self, key: str, index: int) -> int:
        """Index of the image in the source now: usually the one it had."""
        assert self.source is not None
        # a source that has not changed needs no index over all keys; the first miss builds it
        if index < len(self.source) and storable(self.source.key(index)) == key:
            return index
        if self._places is None:
            self._places = {storable(self.source.key(place)): place for place in range(len(self.source))}
        if key not in self._places:
            raise BadImage("the image is not in the data any more; `ldm-vae encode --update` drops it")
        return self._places[key]


def open_pairs(settings: Training, vae: Any, source: Source | Stream) -> StoredPairs:
    """The pairs of `settings.latent_store`.

    Args:
        vae: what init_from gave, its encoder included.
        source: where pixels are read again, unless the store holds them.

    Raises:
        UsageError: another encoder made the store, its kind or shape does not do, or the images are prepared in
            another way than it was made with.
    """
    path = settings.latent_store
    assert path is not None
    identity = read_manifest(path).identity
    latents = LatentDataset(
        path, raw=True, seed=settings.seed, columns=COLUMNS, view="random",
        resolution=settings.samples or settings.resolution, pixels=identity.pixels,
    )  # fmt: skip
    # the decoder would learn from latents that `init_from`'s encoder never gives
    if identity.encoder != encoder_fingerprint(vae):
        raise UsageError(
            f"latent_store {path}: was made by another encoder than that of init_from {settings.init_from}"
        )
    if identity.store != (expected := "mean" if geometry_of(vae).is_point else "moments"):
        raise UsageError(f"latent_store {path}: expected {expected}, it holds {identity.store}")
    if len(latents.shapes()) > 1 or identity.bucket_step is not None:
        raise UsageError(f"latent_store {path}: expected latents of one shape, it has aspect buckets")
    # pixels in the store make the images unnecessary
    if identity.pixels:
        return StoredPairs(latents, None)
    if isinstance(source, Stream):
        raise UsageError("data: can only be read in order; expected images that can be read again by key, or a store "
                         "with pixels")  # fmt: skip
    # pixels are cut again, so they must be cut as the store's latents were
    ours = preprocessing_identity(source.decoding)
    if identity.preprocessing != ours:
        raise UsageError(
            f"data: is prepared as `{ours}`, the store {path} was made as `{identity.preprocessing}`; set data and "
            "transform.resize so"
        )
    return StoredPairs(latents, windows(source))


def drop_encoder(vae: Any) -> None:
    """Take what is in front of the latents out of memory; `StoredFeed.complete` puts it back."""
    for name in encoder_parts(vae):
        setattr(vae, name, nn.Identity())  # decodes of some classes look at the layers of their encoder


class StoredFeed:
    """Batches of a latent store with their pixels: the decoder alone learns, and `vae` loses its encoder.

    Args:
        vae: what init_from gave, its encoder included.
        source: where pixels are read again, unless the store holds them.
    """

    def __init__(self, settings: Training, vae: Any, source: Source | Stream) -> None:
        self.settings, self.source = settings, source
        self.pairs = open_pairs(settings, vae, source)
        drop_encoder(vae)

    @property
    def prepared(self) -> Preprocessing:
        """Record of the images' decoding: that of the store where it holds the pixels."""
        stored = self.pairs.source is None and decoding_of(self.pairs.latents.manifest.identity.preprocessing)
        return Preprocessing.of(stored or self.source.decoding)

    def compare(self, accelerator: Accelerator, *, resumed: bool) -> None:
        """Say whether the store, and the images where they are read, are others than those that the run began with."""
        run = self.settings.output_dir
        compare_store(run, "latent_store", self.pairs.latents.manifest, accelerator, resumed=resumed)
        if self.pairs.source is not None:
            compare_images(run, "data", self.source, accelerator, resumed=resumed)

    def batches(self, accelerator: Accelerator, images_seen: int, quarantine: Quarantine) -> Iterator[StoredBatch]:
        """The endless stream of this rank's batches, from `images_seen` on, in an order that the seed decides."""
        layout = layout_of(self.settings, accelerator, images_seen)
        workers, pinned = layout.pop("num_workers"), layout.pop("pin_memory")
        work = sampler.batches(sampler.Order(layout.pop("seed"), len(self.pairs.latents)), **layout)
        return load(self.pairs, work, workers, pinned)

    def complete(self, vae: Any) -> Any:
        """The whole VAE for validation and export: `vae` with the encoder of init_from, which made the store."""
        assert self.settings.init_from is not None
        complete = load_autoencoder(self.settings.init_from)
        # not strict: the trained network has no encoder, that of init_from stays
        complete.load_state_dict(vae.state_dict(), strict=False)
        return record(complete.to(vae.device), self.prepared)
