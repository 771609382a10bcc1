"""LatentDataset: a latent store as a map-style torch dataset, memory-mapped, at memory speed.

    data = LatentDataset("latents")
    data[0]["latents"]                    # scaled [c, h, w], fp32; no two visits share a draw of it (`visits.py`)
    data.decode(data[0]["latents"], vae)  # back to pixels [C, H, W]
    for batch in data.loader(64): ...     # shuffled batches of an epoch

Each shard is mapped once per process (`mapped_files.py`); rows go straight from the map into the batch's buffer.

Legend: B batch, c latent channels, t h w latent positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.normalisation import Normalisation, NormalisationKind
from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store.format.layout import PIXELS, SAFETENSORS_DTYPES, TENSOR_NAMES
from ldm_vae.latent_store.format.manifest import Manifest, ShardRecord, place_of, read_finished
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.read.batch import BatchRows, Item
from ldm_vae.latent_store.read.mapped_files import Maps, open_files
from ldm_vae.latent_store.read.visits import Visits

if TYPE_CHECKING:
    from ldm_vae.latent_store.read.loader import LatentLoader

Integers = npt.NDArray[np.int64]


class LatentDataset(Dataset[Item]):
    """Map-style dataset of a latent store.

    Items hold `latents` [c, h, w] fp32, of clips [c, t, h, w], of sounds [c, n], sampled anew at each visit and
    normalised as the VAE's config.json says (of codes `indices` int64, [h, w] or [q, h, w]), `index`, and the columns.
    Works with any torch DataLoader and sampler; `loader` is the fast way, and resumes exactly whatever was read ahead.

    A draw is keyed by (seed, epoch, index, visit, rank): the epoch of `set_epoch` (0), the number of earlier visits of
    the sample in it, and the rank of the process (torch.distributed's, else $RANK). Visits are counted in memory that
    data workers share, 4 bytes per sample. So no draw comes twice in a launch, in any order, by any worker and on any
    rank, unless `set_epoch` goes back. The first visit in an epoch on rank 0 is the draw that `loader` gives in it.

    Args:
        path: the store's folder, or a URL of any file system that fsspec knows (`remote/`).
        raw: give the stored tensors instead (`mean` and `logvar`, or what the store has), unscaled, fp32; or the name
            of one of them, which is then given as it is stored.
        sample: z = mean + sigma * noise; False gives the mean, at every visit.
        seed: of the noise and of random views.
        columns: which columns to give; None is all (of `loader`: caption and label, where they exist).
        normalisation: one of your own, or `scale`, `shift`, `channel` from the store's measured statistics; None is the
            one that the VAE's config.json named.
        view: which view (`""`, `flip`, `top_left`, ...), or `random`: another one each visit, keyed as the noise is.
        resolution: only samples of this resolution; None is all.
        pixels: also give `pixels`, uint8 [C, H, W], of a store that was made with them.
        cache_bytes: of a URL, the most that its cache may hold (default: $LDM_VAE_STORE_CACHE, else 50 GB or half of
            what is free); smaller than the store it makes shuffled reading download shards again and again.

    Raises:
        UsageError: no finished store of this format there; an unknown column, view, resolution or normalisation.

    >>> from ldm_vae import LatentDataset, load_autoencoder, open_images, write_store
    >>> vae = load_autoencoder("my-vae")
    >>> _ = write_store(vae, open_images("photos", vae), "my-latents", resolution=32)
    >>> latents = LatentDataset("my-latents")
    >>> latents[0]["latents"].shape  # scaled as the VAE's config.json says
    torch.Size([4, 16, 16])
    >>> latents.decode(latents[0]["latents"][None], vae).shape
    torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        raw: bool | str = False,
        sample: bool = True,
        seed: int = 0,
        columns: Sequence[str] | None = None,
        normalisation: Normalisation | NormalisationKind | None = None,
        view: str = "",
        resolution: int | None = None,
        pixels: bool = False,
        cache_bytes: float | None = None,
    ) -> None:
        self.path = place_of(path)
        self.manifest: Manifest = read_finished(self.path)
        self.raw, self.sample, self.seed = raw, sample, seed
        identity = self.manifest.identity
        _known("view", view, (*identity.views, "random"))
        self._view = view
        if resolution is not None:
            _known("resolution", resolution, identity.resolution)
        if pixels and not identity.pixels:
            raise UsageError("pixels: the store has none; make one with `ldm-vae encode --pixels`")
        self.columns = tuple(self.manifest.columns if columns is None else columns)
        for name in self.columns:
            _known("columns", name, tuple(self.manifest.columns))
        # a loader converts every value of a batch from Arrow: by default only those that training asks for
        usual = tuple(name for name in ("caption", "label") if name in self.manifest.columns)
        self.batch_columns = usual if columns is None else self.columns
        self.normalisation = self._choose(normalisation)
        self._names = TENSOR_NAMES[identity.store]
        if isinstance(raw, str):
            _known("raw", raw, self._names)
            self._names = (raw,)
        self._pixels = pixels
        self._dtype = SAFETENSORS_DTYPES[identity.dtype]
        self.shards: tuple[ShardRecord, ...] = tuple(
            shard for shard in self.manifest.shards if resolution in (None, shard.resolution)
        )
        live = np.array([shard.live for shard in self.shards], dtype=np.int64)
        self._stops: Integers = np.cumsum(live)
        self._starts: Integers = self._stops - live
        # of a shard that has lost rows: how many live ones come before each of those
        self._before_removed: dict[int, Integers] = {
            number: np.asarray(shard.removed, dtype=np.int64) - np.arange(len(shard.removed))
            for number, shard in enumerate(self.shards)
            if shard.removed
        }
        self._several_shapes = len({shard.shape for shard in self.shards}) > 1
        self.files = open_files(self.path, self.manifest, cache_bytes)
        self._maps = Maps(self.files, self.shards)
        # what is the same at every visit needs no count
        self._draws = view == "random" or (sample and not raw and "logvar" in self._names)
        self._visits = Visits(len(self) if self._draws else 0)

    def _choose(self, normalisation: Normalisation | NormalisationKind | None) -> Normalisation:
        if normalisation is not None and self.manifest.identity.codes is not None:
            raise UsageError("normalisation: the store holds indices of codes, which are not scaled")
        named = self.manifest.recorded.normalisation
        if isinstance(normalisation, str):
            measured = self.statistics.normalisation(normalisation).laid_out_for(named.get("pipelines"))
            return replace(measured, sounds=len(self.manifest.shards[0].shape) == 2)
        return normalisation or (Normalisation(1.0) if self.raw and not named else self.manifest.normalisation)

    @property
    def statistics(self) -> LatentStatistics:
        """Measured when the store was made. Raises UsageError for indices: `manifest.statistics` has their usage."""
        if self.manifest.identity.codes is not None:
            raise UsageError(
                "statistics: the store holds indices of codes, which have no mean; see manifest.statistics"
            )
        try:
            return LatentStatistics.from_json(self.manifest.statistics or {})
        except (ValueError, KeyError, TypeError) as error:
            raise WorkError(f"store {self.path}: manifest.json is damaged: statistics: {error}") from error

    @property
    def epoch(self) -> int:
        """The epoch that noise and random views are keyed by."""
        return self._visits.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, between two passes: its draws are the same in every process that begins it, whatever was
        drawn or read ahead before (`loader` needs no such call). In the epoch that is under way nothing changes;
        an earlier one, whose draws would come again, is warned of."""
        if epoch < self.epoch:
            warnings.warn(
                f"set_epoch: {epoch} after {self.epoch} draws the noise of that epoch again; where a run is resumed, "
                f"also give its loader the epoch (of Accelerate: `loader.set_epoch({self.epoch})`)",
                stacklevel=2,
            )
        self._visits.begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and visits of this process, for a DataLoader of one's own. They are counted where samples are read:
        what workers or `accelerator.prepare` have read ahead, and was not given yet, is counted too, and draws anew
        after a resume. `loader` has no such limit, nor has `set_epoch` at each pass."""
        return {"samples": len(self), "seed": self.seed, **self._visits.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws behind those.

        Raises:
            UsageError: the state is of another store, seed or rank.
        """
        for name, mine in (("samples", len(self)), ("seed", self.seed), ("rank", self._visits.rank)):
            if state[name] != mine:
                raise UsageError(f"dataset state: {name} was {state[name]}, is {mine}: the draws would be others")
        self._visits.load_state_dict(state)

    def __repr__(self) -> str:
        return f"LatentDataset({str(self.path)!r}: {len(self):,} samples, {self.manifest.contents})"

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of one sample as it is given; a store of one resolution and length, without buckets, has one."""
        return self._given(self.shards_of(self._checked(np.asarray([index], dtype=np.int64)).tolist())[0].shape)

    def _given(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored if self.raw or self.manifest.identity.codes is not None else self.normalisation.shape(stored)

    def shapes(self) -> dict[tuple[int, ...], Sequence[int] | Integers]:
        """The shapes of samples as they are given, each with the indices of its samples."""
        # the usual store: a range instead of an array of all indices
        if len({shard.shape for shard in self.shards}) == 1:
            return {self._given(self.shards[0].shape): range(len(self))}
        found: dict[tuple[int, ...], list[Integers]] = {}
        for number, shard in enumerate(self.shards):
            found.setdefault(self._given(shard.shape), []).append(np.arange(self._starts[number], self._stops[number]))
        return {shape: np.concatenate(parts) for shape, parts in found.items()}

    def loader(self, batch_size: int, **options: Any) -> LatentLoader:
        """Batches of this dataset, shuffled, sharded over ranks, resumable: see `LatentLoader`."""
        from ldm_vae.latent_store.read.loader import LatentLoader

        return LatentLoader(self, batch_size, **options)

    def __getitem__(self, index: int) -> Item:
        item: Item = self.__getitems__([index])[0]
        return item

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Item]:
        """A whole batch at once: the way torch's DataLoader asks for it."""
        checked = self._checked(np.asarray(indices, dtype=np.int64))
        if self._several_shapes:
            shard, _ = self._places(checked)
            if len({self.shards[number].shape for number in set(shard)}) > 1:
                return [self[index] for index in checked.tolist()]  # one buffer cannot hold them: single items
        found = checked.tolist()
        epoch, visits = self._visits.next(found) if self._draws else (self.epoch, None)
        return BatchRows(self.read(found, [epoch] * len(found), self.columns, visits), len(found))

    def _checked(self, indices: Integers) -> Integers:
        """Non-negative indices. Raises IndexError for the first that is outside of the store."""
        outside = (indices < -len(self)) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"index {indices[outside][0]} of a store of {len(self)} samples")
        return np.where(indices < 0, indices + len(self), indices)

    def read(
        self,
        indices: Sequence[int],
        epochs: Sequence[int],
        columns: Sequence[str],
        visits: Sequence[int] | None = None,
    ) -> Item:
        """One batch of samples that share a latent shape, each of its own epoch (and visit in it: the first), not
        counted: tensors [B, ...], columns as lists."""
        shard, row = self._places(np.asarray(indices, dtype=np.int64))
        shape = self.shards[shard[0]].shape
        views = self._view if self._view != "random" else self.views(indices, epochs, visits)
        stored = {name: self._maps.gather(name, views, shard, row, shape, self._dtype) for name in self._names}
        batch: Item = {}
        if self.raw:
            as_stored = isinstance(self.raw, str)
            batch |= stored if as_stored else {name: _widened(value) for name, value in stored.items()}
        elif "indices" in stored:
            batch["indices"] = _widened(stored["indices"])
        else:
            # fp32 before noise and normalisation: rounding happens once, in the store
            z = stored[self._names[0]].float()
            if "logvar" in stored and self.sample:
                noise = rng.normal(self.seed, "latent store", _keys(indices, epochs, visits), shape)
                z = Moments(z, stored["logvar"].float()).sample(noise)
            batch["latents"] = self.normalisation.apply(z)
        if self._pixels:
            batch[PIXELS] = self._maps.pixels(views, shard, row)
        batch["index"] = torch.tensor(indices)
        for name in columns:
            batch[name] = [self._maps.value(s, r, name) for s, r in zip(shard, row, strict=True)]
        return batch

    def _places(self, indices: Integers) -> tuple[list[int], list[int]]:
        """Shard number of each sample, and its row in the shard's files."""
        # samples count live rows only; below they become rows of the file
        shard = np.searchsorted(self._stops, indices, side="right")
        row = indices - self._starts[shard]
        if self._before_removed:
            for number in np.unique(shard).tolist():
                if (before := self._before_removed.get(number)) is not None:
                    own = shard == number
                    # `before` counts the live rows in front of each removed one, so this adds the removed rows in front
                    # of the sample's
                    row[own] += np.searchsorted(before, row[own], side="right")
        return shard.tolist(), row.tolist()

    def row(self, index: int, columns: Sequence[str]) -> Item:
        """Columns of one sample, without its tensors."""
        shard, row = self._places(self._checked(np.asarray([index], dtype=np.int64)))
        return {name: self._maps.value(shard[0], row[0], name) for name in columns}

    def shards_of(self, indices: Sequence[int]) -> list[ShardRecord]:
        """The shards that hold some samples, each once."""
        shard, _ = self._places(np.asarray(indices, dtype=np.int64))
        return [self.shards[number] for number in dict.fromkeys(shard)]

    def column(self, name: str) -> list[Any]:
        """A column of all samples, in their order. Raises UsageError for one that the store does not have."""
        _known("column", name, tuple(self.manifest.columns))
        values: list[Any] = []
        for number, shard in enumerate(self.shards):
            found = self._maps.columns(number).get(name)
            rows = [None] * shard.rows if found is None else found.to_pylist()
            values += [rows[row] for row in shard.live_rows.tolist()]
        return values

    def views(self, indices: Sequence[int], epochs: Sequence[int], visits: Sequence[int] | None = None) -> list[str]:
        """View of each sample in its epoch (and visit in it: the first)."""
        if self._view != "random":
            return [self._view] * len(indices)
        views = self.manifest.identity.views
        keys = _keys(indices, epochs, visits)
        return [views[int(rng.generator(self.seed, "view", *key).integers(len(views)))] for key in keys]

    # --- back to pixels -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, scaled: torch.Tensor, vae: Any) -> torch.Tensor:
        """latents [c, *p] or [B, c, *p], or indices [*p] or [B, *p], of several codebooks [k, *p] or [B, k, *p] of the
        first k, as this dataset gives them => pixels, of sounds samples, fp32 and not clamped."""
        single = scaled.ndim == len(self.manifest.shards[0].shape)
        if self.manifest.identity.codes is not None:
            pixels = finite.decode_indices(vae, (scaled[None] if single else scaled).to(vae.device))
        else:
            z = self.normalisation.undo(scaled[None] if single else scaled)
            pixels = finite.decode(vae, z.to(vae.device))
        return pixels[0] if single else pixels


def _widened(stored: torch.Tensor) -> torch.Tensor:
    """fp32 of any float, int64 of any integer."""
    return stored.float() if stored.is_floating_point() else stored.long()


def _keys(
    indices: Sequence[int], epochs: Sequence[int], visits: Sequence[int] | None
) -> Iterable[tuple[int, int, int]]:
    """Coordinates of each sample's draw."""
    return zip(epochs, indices, visits or [0] * len(indices), strict=True)


def _known(what: str, name: Any, exist: Sequence[Any]) -> None:
    if name not in exist:
        raise UsageError(f"{what}: the store has no {name!r}; it has {', '.join(map(repr, exist))}")
