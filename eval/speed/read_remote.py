"""`eval.speed read --remote`: an epoch of latents of 8 x 32 x 32 fp16 from an S3 server on the loopback interface.

- `read_remote`: `LatentDataset("s3://...").loader(64, window=4)`, an empty cache at the start of each round;
- `read_remote_warm`: the same with what that round has left in the cache;
- `webdataset`: WebDataset over the same latents as .npy in tars, by HTTP from the same server (it keeps no copy);
- `mosaicml_streaming` and `..._warm`: StreamingDataset over the same latents as MDS shards, with its default shuffle.

All shuffle among the rows of four shards, which is WINDOW here, a buffer there, a shuffle block in the last, and give
batches of 64 as tensors, `_2_workers` from a DataLoader with two. The server is moto's, in a process of its own on the
same machine: a rate is of readers and server together. Ours alone compares every file with its checksum.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from ldm_vae import LatentDataset
from ldm_vae.core.errors import UsageError

from .synthetic_store import write_synthetic
from .timing import interleave, row

SAMPLES, SHARD, BATCH, WINDOW = 8192, 512, 64, 4
SHAPE = (8, 32, 32)
WORKERS = (0, 2)
BUCKET = "latents"
REGION = {
    "NO_PROXY": "127.0.0.1",
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}
NEEDED = "moto[server] s3fs webdataset mosaicml-streaming"


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json; of readers that are not installed there is none, and it is said.

    Raises:
        UsageError: the server or the reader's own file system is not installed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, _serving() as endpoint:
            surroundings = {**REGION, "S3_ENDPOINT_URL": endpoint, "XDG_CACHE_HOME": f"{folder}/cache"}
            with (
                mock.patch.dict(os.environ, surroundings),
                mock.patch.dict(fsspec.config.conf, {"s3": {"endpoint_url": endpoint}}),
            ):
                return _readers(Path(folder), options.rounds, SAMPLES)
    finally:
        torch.set_num_threads(threads)


def _readers(folder: Path, rounds: int, samples: int) -> list[dict[str, Any]]:
    write_synthetic(folder / "store", samples, SHAPE, SHARD, "mean")
    means: Any = LatentDataset(folder / "store", raw="mean", columns=()).__getitems__(range(samples))
    latents = means.batch["mean"].numpy()
    files = fsspec.filesystem("s3")
    files.mkdir(BUCKET)
    files.put(str(folder / "store"), f"{BUCKET}/store", recursive=True)
    cache = folder / "cache"
    contenders: dict[str, Callable[[], Any]] = {}
    sources: dict[str, Any] = {}
    if _has("webdataset"):
        tars = _write_tars(folder / "tars", latents)
        files.put(str(folder / "tars"), f"{BUCKET}/tars", recursive=True)
        sources["webdataset"] = [files.sign(f"{BUCKET}/tars/{tar}", expiration=24 * 3600) for tar in tars]
    if _has("streaming"):
        _write_mds(folder / "mds", latents)
        files.put(str(folder / "mds"), f"{BUCKET}/mds", recursive=True)
        sources["mosaicml_streaming"] = folder / "copy"
    for workers in WORKERS:
        end = f"_{workers}_workers" if workers else ""
        contenders[f"read_remote{end}"] = _once(_ours, workers, cache, samples)
        contenders[f"read_remote_warm{end}"] = _once(_ours, workers, None, samples)
        if (urls := sources.get("webdataset")) is not None:
            contenders[f"webdataset{end}"] = _once(_webdataset, workers, urls, samples)
        if (copy := sources.get("mosaicml_streaming")) is not None:
            contenders[f"mosaicml_streaming{end}"] = _once(_streaming, workers, copy, True, samples)
            contenders[f"mosaicml_streaming_warm{end}"] = _once(_streaming, workers, copy, False, samples)
    times = interleave(contenders, rounds, "read --remote")
    rows = []
    for name in contenders:
        other = name.replace("read_remote", "mosaicml_streaming")
        rate = {"images_per_s": samples / float(np.median(times[name]))}
        pairs = [other, name.replace("read_remote", "webdataset")] if name.startswith("read_remote") else [None]
        known = [to for to in pairs if to is None or to in contenders] or [None]
        rows += [row(name, times, name, to, **rate) for to in known]
    return rows


def _once(read: Callable[..., int], *args: Any) -> Callable[[], None]:
    """Run a reader, and be sure that an epoch is an epoch."""
    *given, samples = args

    def once() -> None:
        seen = read(*given)
        if seen != samples:
            raise AssertionError(f"{read.__name__}: expected {samples} latents, got {seen}")

    return once


# --- readers ----------------------------------------------------------------------------------------------------------


def _ours(workers: int, cleared: Path | None) -> int:
    if cleared is not None:
        shutil.rmtree(cleared, ignore_errors=True)
    data = LatentDataset(f"s3://{BUCKET}/store", raw="mean", columns=())
    return sum(len(batch["mean"]) for batch in data.loader(BATCH, window=WINDOW, num_workers=workers))


def _webdataset(workers: int, urls: list[str]) -> int:
    import webdataset

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, workersplitter=webdataset.split_by_worker)
    batches = data.shuffle(WINDOW * SHARD).decode().to_tuple("npy").batched(BATCH, collation_fn=default_collate)
    return sum(len(batch[0]) for batch in DataLoader(batches, batch_size=None, num_workers=workers))


def _streaming(workers: int, copy: Path, cleared: bool) -> int:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if cleared:
        shutil.rmtree(copy, ignore_errors=True)
    clean_stale_shared_memory()
    data = StreamingDataset(
        remote=f"s3://{BUCKET}/mds", local=str(copy), shuffle=True, shuffle_block_size=WINDOW * SHARD,
        num_canonical_nodes=1, batch_size=BATCH,
    )  # fmt: skip
    return sum(len(batch["mean"]) for batch in DataLoader(data, batch_size=BATCH, num_workers=workers))


# --- what they read ---------------------------------------------------------------------------------------------------


def _write_tars(folder: Path, latents: Any) -> list[str]:
    folder.mkdir()
    names = [f"{first // SHARD:06d}.tar" for first in range(0, len(latents), SHARD)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for index in range(number * SHARD, min((number + 1) * SHARD, len(latents))):
                content = io.BytesIO()
                np.save(content, latents[index])
                member = tarfile.TarInfo(f"{index:08d}.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    return names


def _write_mds(folder: Path, latents: Any) -> None:
    from streaming import MDSWriter

    size = SHARD * (latents[0].nbytes + 12)  # with a few bytes of each sample's place
    columns = {"mean": f"ndarray:float16:{','.join(map(str, SHAPE))}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as out:
        for latent in latents:
            out.write({"mean": latent})


def _has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError as error:
        print(f"without {package} ({error}); all: pip install {NEEDED}", file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def _serving() -> Iterator[str]:
    """URL of moto's S3 server, in a process of its own."""
    for package in ("moto", "flask", "s3fs"):
        if not _has(package):
            raise UsageError(f"--remote: the server and its client need `pip install {NEEDED}`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in itertools.count():
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/")
                break
            if server.poll() is not None:
                raise UsageError("--remote: moto's server ended; `python -m moto.server` says why")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
