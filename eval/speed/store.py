"""`eval.speed store`: what a latent store costs as it grows; tensors are holes in files where only their number counts.

- `read`, `index_select`: a batch of 64 small latents from stores of 10^4 to 10^7 samples (pages of zeros, which cost
  what others do once they are in memory), and from a tensor in memory;
- `open`, `manifest_write`: opening a store of 10^7 and of 10^9 samples (its manifest), and writing that;
- `write`: `write_store` of images of 32 px with an encoder that takes no time, seconds an image: decoding, statistics,
  checksums, files;
- `check`, `stat`: asking a finished store of files once more (every one looked at, none read), and a stat call for each
  of them, seconds a file;
- `keys`, `again`, `finish`: the list of the source's keys, a second call that finds every unit done, and merging the
  records of all units into the manifest.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae import LatentDataset
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.source import Record, open_source
from ldm_vae.latent_store import write_store
from ldm_vae.latent_store.format.manifest import read_manifest, write_manifest
from ldm_vae.latent_store.format.work_units import done_records, source_identity
from ldm_vae.latent_store.write.finalize import finish

from .encode import WIDTHS, WaitingEncoder, network
from .synthetic_store import (
    key,
    unfinish,
    write_empty,
    write_sparse,
)
from .timing import PeakMemory, interleave, row

BATCH, STEPS = 64, 100
STORES, SHAPE, UNIT = (10_000, 100_000, 1_000_000, 10_000_000), (4, 8, 8), 2048
LARGEST_RESIDENT = 1_000_000  # rows of half a kilobyte: more would want the memory of the machine
MANIFESTS = (10_000_000, 1_000_000_000)
IMAGES = (1_000, 4_000)
FILES = 20_000


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = _reading(Path(folder), options.rounds) + _writing(Path(folder), options.rounds)
            rows += _asking(Path(folder), options.rounds, FILES)
            for samples in MANIFESTS:
                rows += _opening(Path(folder), samples)
            for samples in STORES:
                rows += _bookkeeping(Path(folder), samples)
            return rows
    finally:
        torch.set_num_threads(threads)


# --- reading ----------------------------------------------------------------------------------------------------------


def _reading(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Beside `index_select` on as many rows in memory: what the processor's caches do to both is not the store's."""
    draw = np.random.default_rng(0)
    contenders: dict[str, Callable[[], Any]] = {}
    for samples in STORES:
        write_sparse(folder / str(samples), samples, SHAPE, UNIT)
        data = LatentDataset(folder / str(samples), raw="mean", columns=())
        batches = [draw.integers(0, samples, BATCH).tolist() for _ in range(STEPS)]
        if samples <= LARGEST_RESIDENT:
            resident = torch.zeros(samples, *SHAPE, dtype=torch.float16).fill_(1)
            contenders[f"index_select {samples}"] = functools.partial(_each, _select, batches, rows=resident)
        contenders[f"read {samples}"] = functools.partial(_each, data.__getitems__, batches)
    times = interleave(contenders, rounds, "store, reading")
    per_batch = {name: [value / STEPS for value in values] for name, values in times.items()}
    rows = []
    for contender in contenders:
        name, samples = contender.split()
        to = f"index_select {samples}"
        beside = to if name == "read" and to in contenders else None
        rate = BATCH / float(np.median(per_batch[contender]))
        place = {"against": "samples", "at": int(samples), "images_per_s": rate}
        rows.append(row(name, per_batch, contender, beside, **place))
    return rows


def _each(read: Callable[..., Any], batches: list[list[int]], **arguments: Any) -> None:
    for batch in batches:
        read(batch, **arguments)


def _select(indices: list[int], rows: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, torch.tensor(indices))


# --- opening ----------------------------------------------------------------------------------------------------------


def _opening(folder: Path, samples: int) -> list[dict[str, Any]]:
    store = folder / f"manifest of {samples}"
    write_empty(store, samples)
    # a process of its own, whose memory nothing else has grown
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(open_store, (store,))
    megabytes = round((store / "manifest.json").stat().st_size / 1e6, 1)
    place = {"manifest_mb": megabytes, "shards": -(-samples // UNIT), "against": "samples", "at": samples}
    return [
        {"name": name, "median_s": seconds, "memory_mb": round(grown / 1e6)} | place
        for name, (seconds, grown) in found.items()
    ]


def open_store(path: Path) -> dict[str, tuple[float, int]]:
    """(seconds, growth of the resident memory) of opening a store, and of writing its manifest once more."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        data = LatentDataset(path)
        opened = time.perf_counter() - start, memory.bytes
        start = time.perf_counter()
        write_manifest(path, data.manifest)
        return {"open": opened, "manifest_write": (time.perf_counter() - start, memory.bytes)}


# --- writing ----------------------------------------------------------------------------------------------------------


class Images:
    """A source of images of 32 px that differ in nothing but their keys."""

    columns: tuple[str, ...] = ()
    decoding = Decoding()

    def __init__(self, count: int) -> None:
        self._count, self._image = count, np.zeros((32, 32, 3), np.uint8)

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return key(index)

    def __getitem__(self, index: int) -> Record:
        return Record(key(index), self._image)


def _writing(folder: Path, rounds: int) -> list[dict[str, Any]]:
    encoder = WaitingEncoder.from_config(network(WIDTHS).config)  # whose wait is 0 s

    def write(count: int) -> None:
        shutil.rmtree(folder / "written", ignore_errors=True)
        write_store(encoder, Images(count), folder / "written", resolution=32, shard_size=UNIT)

    times = interleave({str(count): functools.partial(write, count) for count in IMAGES}, rounds, "store, writing")
    each = {count: [value / int(count) for value in values] for count, values in times.items()}
    first = str(IMAGES[0])
    return [
        row("write", each, str(count), None if str(count) == first else first, against="images", at=count)
        for count in IMAGES
    ]


def _asking(folder: Path, rounds: int, count: int) -> list[dict[str, Any]]:
    data, store = folder / "files", folder / "asked"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "0.png")
    paths = [data / f"{number:09d}.png" for number in range(count)]
    (data / "0.png").rename(paths[0])
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    encoder = WaitingEncoder.from_config(network(WIDTHS).config)

    def ask() -> None:
        write_store(encoder, open_source(data), store, resolution=32, shard_size=UNIT, num_workers=0)

    ask()
    ask()  # files that changed within two seconds of their encoding are read once more
    times = interleave({"check": ask, "stat": lambda: [path.stat() for path in paths]}, rounds, "store, asking")
    each = {name: [value / count for value in values] for name, values in times.items()}
    return [row("stat", each, "stat", None, at=count), row("check", each, "check", "stat", at=count)]


def _bookkeeping(folder: Path, samples: int) -> list[dict[str, Any]]:
    """Once each: a call has no cache that a second one would find warm, but for the page cache."""
    rows = []

    def measure(name: str, task: Callable[[], Any]) -> Any:
        with PeakMemory() as memory:
            start = time.perf_counter()
            found = task()
            seconds = time.perf_counter() - start
        growth = {"memory_mb": round(memory.bytes / 1e6), "against": "samples", "at": samples}
        rows.append({"name": name, "median_s": seconds} | growth)
        return found

    source = measure("keys", lambda: source_identity(Images(samples)))
    store = folder / f"finished {samples}"
    write_sparse(store, samples, SHAPE, UNIT)
    plan = unfinish(store, source)
    manifest = read_manifest(store)
    work = plan.digest(manifest.identity)
    measure("again", lambda: [*done_records(store, plan.units(UNIT), work)])
    measure("finish", lambda: finish(store, manifest, plan))
    shutil.rmtree(store)
    return rows
