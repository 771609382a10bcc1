"""(H, W) of every image of a source, which aspect buckets need before the first step.

Only headers are parsed, but every file is read once, by the workers of all ranks together. What was found is kept in
the run folder: a resumed run has the same buckets at once, whatever has vanished since.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm_vae import publish
from ldm_vae.data.decoding import read_size
from ldm_vae.data.ordered import batches_of, items
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.source import Source
from ldm_vae.data.workers import load

Array = np.ndarray[Any, Any]
FILES_AT_ONCE = 64


class _Headers(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, work: Sequence[tuple[int, None]]) -> list[tuple[int, tuple[int, int] | Bad]]:
        return [(index, self._size(index)) for index, _ in work]

    def _size(self, index: int) -> tuple[int, int] | Bad:
        try:
            return read_size(self.source[index].image, self.source.decoding)
        except BadImage as error:
            return Bad(self.source.key(index), error.reason)


def read_sizes(source: Source, indices: range, num_workers: int = 0) -> tuple[Array, list[Bad]]:
    """(H, W) of the images `indices` from their headers, int32 [N, 2], (0, 0) for all others and for those that cannot
    be read; and the latter with their reasons."""
    sizes, bad = np.zeros((len(source), 2), dtype=np.int32), []
    with tqdm(total=len(indices), desc="image sizes", unit="images", disable=None, leave=False) as bar:
        for found in load(_Headers(source), batches_of(items(source, indices), FILES_AT_ONCE), num_workers):
            for index, size in found:
                if isinstance(size, Bad):
                    bad.append(size)
                else:
                    sizes[index] = size
            bar.update(len(found))
    return sizes, bad


def shared_sizes(
    source: Source,
    path: Path,
    *,
    rank: int,
    world_size: int,
    add_up: Callable[[torch.Tensor], torch.Tensor],
    num_workers: int = 0,
) -> tuple[Array, list[Bad]]:
    """All sizes on every rank, int32 [N, 2], each rank having read its part, or from `path` where a run before this one
    left them; and the images that this rank could not read.

    Args:
        path: a safetensors file in the run folder; written by rank 0.
        add_up: the sum of a tensor over all ranks.
    """
    kept = _kept(path, len(source))
    everybody_has_it = int(add_up(torch.tensor([kept is not None], dtype=torch.int32))) == world_size
    if kept is not None and everybody_has_it:
        return kept, []
    count = len(source)
    mine = range(rank * count // world_size, (rank + 1) * count // world_size)
    sizes, bad = read_sizes(source, mine, num_workers)
    together = add_up(torch.from_numpy(sizes)).cpu()
    if rank == 0:
        publish.replace(path, publish.data(save({"height_width": together})))
    return together.numpy(), bad


def _kept(path: Path, count: int) -> Array | None:
    try:
        sizes: Array = load_file(path)["height_width"].numpy()
    except (OSError, SafetensorError, KeyError):
        return None
    return sizes if sizes.shape == (count, 2) else None
