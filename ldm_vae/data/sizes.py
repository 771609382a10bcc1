"""Sizes (H, W) of all images of a source, which aspect buckets need before the first step; of clips (frames, H, W): the
frames of the longest clip that a video has.

Only headers are parsed, but every file is read once, by the workers of all ranks together. What was found is kept in
the run folder with the stamps of the files: a resumed run has the same buckets at once, whatever has vanished since.

Legend: N images; D 2, or 3 of clips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils.data import Dataset

from ldm_vae.core import atomic_io
from ldm_vae.core.progress import Progress
from ldm_vae.data.clips import facts_of, reach
from ldm_vae.data.decoding import read_size
from ldm_vae.data.footage import VideoFacts, tell
from ldm_vae.data.ordered import batches_of, items
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.source import Source
from ldm_vae.data.stamps import Stamps, chunks_of, key_numbers, stamps_of
from ldm_vae.data.workers import load

Array = np.ndarray[Any, Any]
FILES_AT_ONCE = 64


class _Headers(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, work: Sequence[tuple[int, None]]) -> list[tuple[int, tuple[int, ...] | VideoFacts | Bad]]:
        return [(index, self._size(index)) for index, _ in work]

    def _size(self, index: int) -> tuple[int, ...] | VideoFacts | Bad:
        decoding = self.source.decoding
        try:
            image = self.source[index].image
            return read_size(image, decoding) if decoding.frames is None else facts_of(image, decoding)
        except BadImage as error:
            return Bad(self.source.key(index), error.reason)


def read_sizes(source: Source, indices: Sequence[int], num_workers: int = 0) -> tuple[Array, list[Bad]]:
    """(H, W) or (frames, H, W) of the images `indices` from their headers, int32 [N, D], zeros for all others and for
    those that cannot be read; and the latter with their reasons. Of videos it is said what is ignored."""
    clips = source.decoding.frames is not None
    sizes, bad = np.zeros((len(source), 3 if clips else 2), dtype=np.int32), []
    notes: Counter[str] = Counter()
    with Progress(total=len(indices), desc="image sizes", unit="images", leave=False) as bar:
        for found in load(_Headers(source), batches_of(items(source, indices), FILES_AT_ONCE), num_workers):
            for index, size in found:
                if isinstance(size, Bad):
                    bad.append(size)
                elif isinstance(size, VideoFacts):
                    sizes[index] = reach(size, source.decoding), size.height, size.width
                    notes.update(size.notes)
                else:
                    sizes[index] = size
            bar.update(len(found))
    tell(getattr(source, "name", type(source).__name__), notes)
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
    """All sizes on every rank, int32 [N, D], each rank having read its part, or taken it from `path` where a run before
    this one left them; and the images that this rank could not read. What was left is of the images of that time: one
    whose stamp is another now is read again, and keeps its size when that cannot be done.

    Args:
        path: a safetensors file in the run folder; written by rank 0.
        add_up: the sum of a tensor over all ranks.
    """
    count = len(source)
    # consecutive parts: neighbouring files are read by one rank
    mine = range(rank * count // world_size, (rank + 1) * count // world_size)
    keys = key_numbers(source)
    stamps = np.concatenate([np.empty(0, np.uint64), *(some for _, some, _ in stamps_of(source, chunks_of(mine)))])
    sides = 2 if source.decoding.frames is None else 3
    kept = _kept(path, keys, sides)
    left = np.zeros((count, sides + 1), dtype=np.int64) if kept is None else kept
    own = left[mine.start : mine.stop]
    # read again: files without a stamp, and those whose stamp is another than when their size was kept
    doubt = (stamps == 0) | (stamps != np.ascontiguousarray(own[:, -1]).view(np.uint64))
    read, bad = read_sizes(source, [mine[at] for at in np.flatnonzero(doubt).tolist()], num_workers)
    part = np.zeros_like(left)
    now = part[mine.start : mine.stop]
    # a file that cannot be read now keeps the size that it had, so a resumed run has the same buckets
    fresh = read[mine.start : mine.stop]
    now[:, :-1] = np.where(fresh.any(1, keepdims=True), fresh, own[:, :-1])
    now[:, -1] = stamps.view(np.int64)
    # each rank fills its own part, so the sum is the whole
    together = add_up(torch.from_numpy(part)).cpu()
    if rank == 0 and (kept is None or (together.numpy() != kept).any()):
        tensors = {"height_width_stamp": together, "keys": torch.from_numpy(keys.view(np.int64))}
        atomic_io.replace(path, atomic_io.data(save(tensors)))
    return together.numpy()[:, :-1].astype(np.int32), bad if kept is None else []


def _kept(path: Path, keys: Stamps, sides: int) -> Array | None:
    """(H, W, stamp) of images of these keys, int64 [N, D + 1]; None when the file is of others, or an older version's,
    that does not say of which."""
    try:
        tensors = load_file(path)
        sizes: Array = tensors["height_width_stamp"].numpy()
        same = np.array_equal(tensors["keys"].numpy().view(np.uint64), keys)
    except (OSError, SafetensorError, KeyError):
        return None
    return sizes if same and sizes.shape == (len(keys), sides + 1) else None
