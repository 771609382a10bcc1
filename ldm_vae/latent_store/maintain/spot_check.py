"""Spot check: encode random samples of a store again and compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm_vae.core import rng
from ldm_vae.data.source import Source
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.layout import (
    SHARDS,
    TENSOR_NAMES,
    TENSORS,
)
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.statistics import patched
from ldm_vae.latent_store.format.work_units import Unit
from ldm_vae.latent_store.maintain.provenance import indices_of
from ldm_vae.latent_store.maintain.verify import Problem
from ldm_vae.latent_store.remote.at_hand import mapped_tensors, rows_of
from ldm_vae.latent_store.storage.places import Place
from ldm_vae.latent_store.write import sample_stream
from ldm_vae.latent_store.write.crops import cutting_of
from ldm_vae.latent_store.write.encoder import Encoder

# largest difference that rounding explains, in standard deviations of the channel (of indices: share of positions that
# tip over to another code): other devices, batch sizes, threads
TOLERANCE = {"no": 0.01, "bf16": 0.15, "fp16": 0.05}


@dataclass(frozen=True)
class Comparison:
    """Result of a spot check: samples encoded again, those with the same bits, the largest difference in standard
    deviations of its channel (of indices: the largest share of positions with another code), and the problems."""

    samples: int
    identical: int
    worst: float
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Stored:
    shard: int
    row: int
    image_sha256: str


def reencode(
    store: Place,
    manifest: Manifest,
    vae: Any,
    source: Source,
    count: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Encode `count` random samples of a store again, in the batch shape it was made with, and compare what is stored.

    A sample whose image is gone or has changed is a problem too: the store is stale there (`encode --update`).
    """
    chosen = _choose(store, manifest, count, seed)
    places = indices_of(source, (key for key, _ in chosen))
    problems = [
        _problem(manifest, stored, f"row {stored.row} ({key}): its image is not in the data any more")
        for (key, _), stored in chosen.items()
        if key not in places
    ]
    cutting = cutting_of(manifest.identity, vae)
    # the newest settings: older units may have had others, which TOLERANCE allows for
    encoder = Encoder(vae, manifest.identity, batch_size=manifest.batch_size, device=device)
    unit = Unit(0, sorted(set(places.values())))
    std = None if manifest.identity.codes is not None else np.sqrt((manifest.statistics or {})["variance"])
    compared = identical = 0
    worst = 0.0
    threads = torch.get_num_threads()
    # as in the pipeline's encoding threads; more threads would give other bits
    torch.set_num_threads(1)
    try:
        for dealt in sample_stream.samples(source, "", cutting, [unit], encoder.batch_size, 0) if unit.indices else ():
            for ready in dealt.ready:
                stored = chosen.get((ready.row["key"], int(ready.row["resolution"])))
                if stored is None:
                    continue
                if ready.row["image_sha256"] != stored.image_sha256:
                    problems.append(
                        _problem(manifest, stored, f"row {stored.row} ({ready.row['key']}): image has changed")
                    )
                    continue
                # one sample a batch, padded to the batch shape: company changes no bits (encoder.py)
                same, difference = _compare(store, manifest, stored, encoder([ready])[0], std)
                compared, identical, worst = compared + 1, identical + same, max(worst, difference)
                if difference > TOLERANCE[manifest.identity.mixed_precision]:
                    what = (
                        f"row {stored.row} ({ready.row['key']}): {difference:.3f} {unit_of(manifest)} from its image's"
                    )
                    problems.append(_problem(manifest, stored, what))
    finally:
        torch.set_num_threads(threads)
    return Comparison(compared, identical, worst, tuple(problems))


def _choose(store: Place, manifest: Manifest, count: int, seed: int) -> dict[tuple[str, int], _Stored]:
    """Random live rows by key and resolution."""
    live = np.array([shard.live for shard in manifest.shards])
    # numbers of live rows over the whole store; `stops` turns them into shards, `own` into rows of one
    picks = rng.generator(seed, "verify").choice(live.sum(), size=min(count, int(live.sum())), replace=False)
    stops = np.cumsum(live)
    chosen = {}
    for number in np.unique(np.searchsorted(stops, picks, side="right")).tolist():
        shard = manifest.shards[number]
        table = rows_of(store, shard, ["key", "image_sha256"])
        rows = shard.live_rows
        own = picks[(picks < stops[number]) & (picks >= stops[number] - live[number])] - (stops[number] - live[number])
        for row in rows[np.sort(own)].tolist():
            entry = {name: table.column(name)[row].as_py() for name in table.column_names}
            chosen[entry["key"], shard.resolution] = _Stored(number, row, entry["image_sha256"])
    return chosen


def _compare(
    store: Place, manifest: Manifest, stored: _Stored, rows: dict[str, Any], std: np.ndarray[Any, Any] | None
) -> tuple[bool, float]:
    """Compare one row: True if all tensors have the same bits, and how far the first one (mean, sample or indices) is
    off."""
    shard = manifest.shards[stored.shard]
    mapped = mapped_tensors(store, manifest.identity, shard)
    same = all(value[0].tobytes() == mapped[name][stored.row].tobytes() for name, value in rows.items())
    name = TENSOR_NAMES[manifest.identity.store][0]
    if std is None:
        return same, float((rows[name][0] != mapped[name][stored.row]).mean())
    dtype = "BF16" if manifest.identity.dtype == "bf16" else "F32"
    new, old = (
        shards.to_float(v.view(np.uint16) if dtype == "BF16" else v, dtype)
        for v in (rows[name][0], mapped[name][stored.row])
    )
    # statistics are of the channels of patches
    off = patched(np.abs(new.astype(np.float64) - old)[None], manifest.identity.patch)[0]
    return same, float((off / std.reshape(-1, *(1,) * (off.ndim - 1))).max())


def unit_of(manifest: Manifest) -> str:
    """Unit that differences are given in."""
    return "standard deviations" if manifest.identity.codes is None else "of the positions"


def _problem(manifest: Manifest, stored: _Stored, what: str) -> Problem:
    return Problem(f"{SHARDS}/{manifest.shards[stored.shard].name}.{TENSORS}", what)
