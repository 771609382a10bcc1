"""LatentDataset: a latent store as a map-style torch dataset, memory-mapped, at memory speed.

    data = LatentDataset("latents")
    data[0]["latents"]                    # scaled [c, h, w], fp32: what a diffusion model sees
    data[0]["caption"]                    # and every other column of the store
    data.decode(data[0]["latents"], vae)  # back to pixels [C, H, W]

No file is opened per sample: each shard is mapped once per process, when it is first touched, and its pages are shared
between workers. Rows go straight from the map into the batch's buffer.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ldm_vae import keyed, latents
from ldm_vae.errors import UsageError, WorkError
from ldm_vae.latent_store import shards
from ldm_vae.latent_store.layout import SAFETENSORS_DTYPES, SHARDS, TENSOR_NAMES, TENSORS
from ldm_vae.latent_store.manifest import Manifest, read_manifest
from ldm_vae.latent_store.statistics import LatentStatistics
from ldm_vae.latents import Moments, Normalisation, NormalisationKind

Item = dict[str, Any]


class Rows(Sequence[Item]):
    """The samples of one batch: `batch` is the ready collated dict, indexing makes single items from it."""

    def __init__(self, batch: Item, count: int) -> None:
        self.batch, self._count = batch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[k] for k in range(*position.indices(self._count))]
        if not -self._count <= position < self._count:
            raise IndexError(position)
        return {name: values[position] for name, values in self.batch.items()}

    def __iter__(self) -> Iterator[Item]:
        return (self[position] for position in range(self._count))


class LatentDataset(Dataset[Item]):
    """Map-style dataset of a latent store.

    Items hold `latents` [c, h, w] fp32, sampled anew each epoch and normalised as the VAE's config.json says, `index`,
    and the columns. Works with any torch DataLoader and sampler; `loader` is the fast way.

    Args:
        path: the store's folder.
        raw: give the stored tensors instead (`mean` and `logvar`, or what the store has), unscaled, fp32.
        sample: z = mean + sigma * noise; False gives the mean. Noise is keyed by (seed, epoch, index).
        seed: of the noise.
        columns: which columns to give; None is all.
        normalisation: one of your own, or `scale`, `shift`, `channel` from the store's measured statistics; None is the
            one that the VAE's config.json named.

    Raises:
        UsageError: no store there, one of another format version, an incomplete one, or an unknown column.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        raw: bool = False,
        sample: bool = True,
        seed: int = 0,
        columns: Sequence[str] | None = None,
        normalisation: Normalisation | NormalisationKind | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        if not self.manifest.complete:
            raise UsageError(f"store {path}: not finished; run the `ldm-vae encode` command that began it again")
        self.raw, self.sample, self.seed, self.epoch = raw, sample, seed, 0
        self.columns = tuple(self.manifest.columns if columns is None else columns)
        for name in self.columns:
            if name not in self.manifest.columns:
                exist = ", ".join(self.manifest.columns)
                raise UsageError(f"columns: the store has no column {name!r}; it has {exist}")
        self.normalisation = self._choose(normalisation)
        identity = self.manifest.identity
        self._names = TENSOR_NAMES[identity.store]
        self._dtype = SAFETENSORS_DTYPES[identity.dtype]
        self._stops = np.cumsum([shard.live for shard in self.manifest.shards], dtype=np.int64)
        self._starts = self._stops - np.array([shard.live for shard in self.manifest.shards], dtype=np.int64)
        self._maps: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._tables: dict[int, dict[str, Any]] = {}

    def _choose(self, normalisation: Normalisation | NormalisationKind | None) -> Normalisation:
        if isinstance(normalisation, str):
            return self.statistics.normalisation(normalisation)
        return self.manifest.normalisation if normalisation is None else normalisation

    @property
    def statistics(self) -> LatentStatistics:
        """Measured when the store was made."""
        assert self.manifest.statistics is not None
        return LatentStatistics.from_json(self.manifest.statistics)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the noise is keyed by."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.manifest.samples

    def shape(self, index: int) -> tuple[int, ...]:
        """Latent shape (c, h, w) of one sample; a store of one resolution has one shape."""
        return self.manifest.shards[self._places([index])[0][0]].shape

    # --- items --------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> Item:
        rows = self._rows([self._checked(index)])
        item: Item = rows[0]
        return item

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Item]:
        """A whole batch at once: the way torch's DataLoader asks for it."""
        rows: Sequence[Item] = self._rows([self._checked(index) for index in indices])
        return rows

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a store of {len(self)} samples")
        return int(index) % len(self)

    def _rows(self, indices: Sequence[int]) -> Any:
        places = self._places(indices)
        shapes = {self.manifest.shards[shard].shape for shard, _ in places}
        if len(shapes) > 1:  # one buffer cannot hold them: single items, as DataLoader's collate expects
            return [self[index] for index in indices]
        batch: Item = self._tensors(indices, places, shapes.pop())
        batch["index"] = torch.tensor(indices)
        for name in self.columns:
            batch[name] = [self._value(shard, row, name) for shard, row in places]
        return Rows(batch, len(indices))

    def _places(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Where samples lie: (shard, physical row) each."""
        wanted = np.asarray(indices, dtype=np.int64)
        shard = np.searchsorted(self._stops, wanted, side="right")
        rows = wanted - self._starts[shard]
        places = list(zip(shard.tolist(), rows.tolist(), strict=True))
        return [(s, _physical(r, self.manifest.shards[s].removed)) for s, r in places]

    def _tensors(self, indices: Sequence[int], places: list[tuple[int, int]], shape: tuple[int, ...]) -> Item:
        stored = {name: self._gather(name, places, shape) for name in self._names}
        if self.raw:
            return {name: value.float() for name, value in stored.items()}
        z = stored[self._names[0]].float()
        if "logvar" in stored and self.sample:
            noise = keyed.normal(self.seed, "latent store", [(self.epoch, index) for index in indices], shape)
            z = Moments(z, stored["logvar"].float()).sample(noise)
        return {"latents": self.normalisation.apply(z)}

    def _gather(self, name: str, places: list[tuple[int, int]], shape: tuple[int, ...]) -> torch.Tensor:
        """Stored rows => [B, c, h, w] in storage dtype, copied once."""
        dtype: np.dtype[Any] = shards.STORAGE[self._dtype]
        out = np.empty((len(places), *shape), dtype=dtype)
        for position, (shard, row) in enumerate(places):
            out[position] = self._map(shard)[name][row]
        return torch.from_numpy(out) if self._dtype != "BF16" else torch.from_numpy(out).view(torch.bfloat16)

    def _value(self, shard: int, row: int, name: str) -> Any:
        column = self._table(shard).get(name)
        return None if column is None else column[row].as_py()

    # --- files --------------------------------------------------------------------------------------------------------

    def _map(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        mapped = self._maps.get(shard)
        if mapped is None:
            record = self.manifest.shards[shard]
            path = self._inside(f"{record.name}.{TENSORS}")
            mapped = shards.map_tensors(path)
            for name in self._names:
                if name not in mapped or mapped[name].shape != (record.rows, *record.shape):
                    raise WorkError(
                        f"shard {path}: tensor {name} is not as the manifest says; run `ldm-vae store verify`"
                    )
            self._maps[shard] = mapped
        return mapped

    def _table(self, shard: int) -> dict[str, Any]:
        columns = self._tables.get(shard)
        if columns is None:
            table = shards.map_rows(self._inside(self.manifest.shards[shard].name)).combine_chunks()
            columns = {name: table.column(name).chunk(0) for name in table.column_names}
            self._tables[shard] = columns
        return columns

    def _inside(self, name: str) -> Path:
        """The path of a shard's file. Raises WorkError for a link that leads out of the store."""
        path = self.path / SHARDS / name
        if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
            raise WorkError(f"shard {path}: is a link that leads out of the store")
        return path

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the files themselves: maps are not sent, their pages are shared anyway."""
        return {**self.__dict__, "_maps": {}, "_tables": {}}

    # --- back to pixels -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, scaled: torch.Tensor, vae: Any) -> torch.Tensor:
        """latents [c, h, w] or [B, c, h, w] as this dataset gives them => pixels, fp32 and not clamped."""
        single = scaled.ndim == 3
        z = self.normalisation.undo(scaled[None] if single else scaled)
        pixels = latents.decode(vae, z.to(vae.device))
        return pixels[0] if single else pixels


def _physical(row: int, removed: Sequence[int]) -> int:
    """The row in the file of the row-th sample that is still there."""
    for gone in removed:
        if gone > row:
            break
        row += 1
    return row
