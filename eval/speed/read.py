"""`eval.speed read`: random batches of 64 latents of 8 x 32 x 32 fp16 from a store, beside other readers.

- `read_raw`: one stored tensor through `LatentDataset.__getitems__` into a batch;
- `read_sampled`: what `LatentDataset.loader()` yields by default: both moments, keyed noise, scaling;
- `index_select`: the same rows from one tensor in memory, and `resident_sampled` the same arithmetic on it;
- `reopen_safetensors`: a reader that opens a file per sample; `npz_per_image`: one file an image;
- `parquet`: datasets in torch format.

`--remote` measures other readers, from an object store (`read_remote.py`).

Everything was written just before, so the files are in the page cache: this is the reader's cost and not the disk's.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ldm_vae import LatentDataset
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.core import rng

from .synthetic_store import write_synthetic
from .timing import interleave, row

SAMPLES, BATCH, STEPS = 4096, 64, 100
SHAPE = (8, 32, 32)
FILES = 512  # of the readers that have a file per sample
SLOW_STEPS = 4


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    if options.remote:
        from . import read_remote  # whose packages the others do not need

        return read_remote.run(options)
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _readers(Path(folder), options.rounds)
    finally:
        torch.set_num_threads(threads)


def _readers(folder: Path, rounds: int) -> list[dict[str, Any]]:
    write_synthetic(folder / "store", SAMPLES)
    raw = LatentDataset(folder / "store", raw="mean", columns=())
    sampled = LatentDataset(folder / "store")
    means, logvars = (torch.from_numpy(_all(sampled, name)) for name in ("mean", "logvar"))
    draw = np.random.default_rng(0)
    batches = [draw.integers(0, SAMPLES, BATCH).tolist() for _ in range(STEPS)]
    few = [[index % FILES for index in batch] for batch in batches[:SLOW_STEPS]]
    for index in range(FILES):
        np.savez(folder / f"{index}.npz", latents=means[index].numpy())
    parquet = _parquet(folder, means)
    file = folder / "store" / "shards" / "00000000.safetensors"

    def resident(indices: list[int]) -> torch.Tensor:
        chosen = torch.tensor(indices)
        noise = rng.normal(0, "latent store", zip(itertools.repeat(0), indices), SHAPE)
        moments = Moments(means.index_select(0, chosen).float(), logvars.index_select(0, chosen).float())
        return sampled.normalisation.apply(moments.sample(noise))

    loaders = {
        f"read_sampled{name}": sampled.loader(BATCH, num_workers=workers)
        for name, workers in (("", 0), ("_2_workers", 2))
    }
    raw_workers = DataLoader(
        raw, batch_sampler=BatchSampler(RandomSampler(raw), BATCH, True), num_workers=2, collate_fn=_same
    )
    # name => (what runs, how many batches)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "index_select": (lambda: [means.index_select(0, torch.tensor(b)) for b in batches], STEPS),
        "read_raw": (lambda: [raw.__getitems__(b) for b in batches], STEPS),
        "read_raw_2_workers": (lambda: sum(1 for _ in raw_workers), SAMPLES // BATCH),
        "resident_sampled": (lambda: [resident(b) for b in batches[:20]], 20),
        "reopen_safetensors": (lambda: [torch.stack([_reopen(file, i) for i in b]) for b in few], SLOW_STEPS),
        "npz_per_image": (lambda: [np.stack([_npz(folder, i) for i in b]) for b in few], SLOW_STEPS),
        "parquet": (lambda: [parquet[b] for b in batches[:20]], 20),
    }
    contenders |= {
        name: (lambda loader=loader: sum(1 for _ in itertools.islice(loader, 20)), 20)  # type: ignore[misc]
        for name, loader in loaders.items()
    }
    times = interleave({name: function for name, (function, _) in contenders.items()}, rounds, "read")
    per_batch = {name: [value / contenders[name][1] for value in values] for name, values in times.items()}
    rows = [row(name, per_batch, name, None, **_rate(per_batch[name])) for name in contenders if "read_" not in name]
    others = ("index_select", "reopen_safetensors", "npz_per_image", "parquet")
    rows += [row("read_raw", per_batch, "read_raw", to, **_rate(per_batch["read_raw"])) for to in others]
    rows.append(row("read_raw_2_workers", per_batch, "read_raw_2_workers", "index_select"))
    rows += [row(name, per_batch, name, "resident_sampled", **_rate(per_batch[name])) for name in loaders]
    return rows


def _rate(seconds: list[float]) -> dict[str, float]:
    return {"images_per_s": BATCH / float(np.median(seconds))}


def _all(data: LatentDataset, name: str) -> np.ndarray[Any, Any]:
    rows = LatentDataset(data.path, raw=name, columns=()).__getitems__(range(len(data)))
    stored: torch.Tensor = rows.batch[name]  # type: ignore[attr-defined]
    return stored.numpy()


def _parquet(folder: Path, means: torch.Tensor) -> Any:
    import datasets

    # flat lists of a fixed length: several times faster than datasets' Array3D
    features = datasets.Features({"mean": datasets.List(datasets.Value("float16"), length=int(np.prod(SHAPE)))})
    table = datasets.Dataset.from_dict({"mean": list(means[:FILES].flatten(1).numpy())}, features=features)
    file = str(folder / "means.parquet")
    table.to_parquet(file)
    loaded = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(folder / "cache"))
    return _Modulo(loaded.with_format("torch"))


class _Modulo:
    """The first FILES samples stand for all."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getitem__(self, indices: list[int]) -> Any:
        return self.table[[index % FILES for index in indices]]["mean"].view(len(indices), *SHAPE)


def _same(batch: Any) -> Any:
    return batch.batch


def _reopen(file: Path, index: int) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as opened:
        latent: torch.Tensor = opened.get_slice("mean")[index : index + 1][0]
    return latent


def _npz(folder: Path, index: int) -> Any:
    with np.load(folder / f"{index}.npz") as opened:
        return opened["latents"]
