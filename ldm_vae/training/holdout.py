"""Hold-out of a run: `data` split by key, its training part searched for copies of held-out images.

The search decodes every image once, each rank its share. What it found lies in RUN/inventory/holdout.json; a run that
goes on with images of the same keys takes it from there.

Legend: N images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ldm_vae.core import atomic_io
from ldm_vae.core.config import Section, validate
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import parse_json
from ldm_vae.data import copies
from ldm_vae.data.holdout import Holdout, Subset, is_held_out, numbers_of, parts_of, record_of
from ldm_vae.data.source import Source
from ldm_vae.data.stamps import Stamps
from ldm_vae.run.folder import check_run_folder
from ldm_vae.training.config import MAY_CHANGE, Training

FILE = Path("inventory") / "holdout.json"
NAMED = 3  # copies that are said by name


class Found(Section):
    """Contents of FILE: the split, and training images that are left out, each with the held-out one that it copies."""

    holdout: Holdout
    copies: dict[str, str]


def split(settings: Training, source: Source, accelerator: Accelerator) -> tuple[Subset, Subset]:
    """The images to train on and those that are held out, the same on every rank.

    Raises:
        UsageError: a stream, a part without an image, or a run folder of another config.
    """
    assert settings.holdout is not None
    numbers = numbers_of(source)
    without = record_of(numbers, settings.holdout, np.empty(0, np.uint64))
    if settings.data.holdout_copies == "keep":
        return parts_of(source, numbers, without)
    check_run_folder(settings, MAY_CHANGE)  # before all images are decoded
    path, main = settings.output_dir / FILE, accelerator.is_main_process
    # decided by one process: all must agree on whether there is a search, in which they meet
    decided: list[Found | None] = [_kept(path, without) if main else None]
    broadcast_object_list(decided)
    if decided[0] is None:
        looks = _looks(settings, source, accelerator)
        if main:
            searched = _search(source, numbers, looks, settings.holdout)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_io.replace(path, atomic_io.data(searched.model_dump_json(indent=1).encode() + b"\n"))
            decided = [searched]
        broadcast_object_list(decided)
    (found,) = decided
    assert found is not None
    train, held_out = parts_of(source, numbers, found.holdout)
    accelerator.print(f"data.holdout: {len(held_out):,} of {len(numbers):,} images are held out, {len(train):,} train")
    if found.copies:
        first = ", ".join(f"{copy} (of {original})" for copy, original in [*found.copies.items()][:NAMED])
        accelerator.print(
            f"data.holdout: {len(found.copies):,} copies of held-out images are left out: {first}; {path}"
        )
    return train, held_out


def _kept(path: Path, wanted: Holdout) -> Found | None:
    """The file of an earlier start with images of the same keys."""
    try:
        found = validate(Found, parse_json(read_bytes(path)), str(path))
    except (OSError, ValueError):
        return None
    return found if found.holdout.model_copy(update={"left_out": ()}) == wanted else None


def _looks(settings: Training, source: Source, accelerator: Accelerator) -> torch.Tensor:
    """The frequencies fp16 [N, 64] of all images on every rank, each having decoded its share."""
    rank, ranks, count = accelerator.process_index, accelerator.num_processes, len(source)
    # consecutive parts: neighbouring files are read by one rank
    mine = range(rank * count // ranks, (rank + 1) * count // ranks)
    part = torch.zeros(count, copies.BITS, dtype=torch.half)
    part[mine.start : mine.stop] = copies.look(source, mine, settings.dataloader_num_workers)
    looks: torch.Tensor = accelerator.reduce(part.to(accelerator.device), "sum")
    return looks


def _search(source: Source, numbers: Stamps, looks: torch.Tensor, share: float) -> Found:
    """The split with what was found: for each training image the first held-out one that it is a copy of."""
    held = is_held_out(numbers, share)
    ours, theirs = np.flatnonzero(~held), np.flatnonzero(held)
    at = torch.from_numpy(held).to(looks.device)
    pairs: list[tuple[int, int]] = []
    for first, same in copies.matches(looks[~at], looks[at]):
        rows = same.any(1).nonzero().flatten()
        originals = same[rows].int().argmax(1)
        pairs += zip(ours[rows.cpu().numpy() + first].tolist(), theirs[originals.cpu().numpy()].tolist(), strict=True)
    left_out = numbers[[copy for copy, _ in pairs]] if pairs else numbers[:0]
    names = {source.key(copy): source.key(original) for copy, original in pairs}
    return Found(holdout=record_of(numbers, share, left_out), copies=names)
