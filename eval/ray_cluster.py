"""Encode tiny images on a Ray cluster of two nodes on this machine, beside the same encode by one launch.

    python -m eval.ray_cluster --output measured                          # 10^5 images; minutes on two cores
    python -m eval.ray_cluster --output measured --loopback_s3            # the store in an S3 server (moto's)
    python -m eval.ray_cluster --output measured --store s3://mine/latents  # or anywhere else

Images of 32 px in tar shards and a tiny network, so that what surrounds the network is most of the work. Meanwhile

- a node is killed when a quarter of the units is done, and another one is added (three actors have two places);
- the driver is stopped with Ctrl-C when half of them are, and started again with two actors;
- the process of an actor is killed when three quarters are.

Then every file is read again, compared with the store of the launch (equal bytes), and the keys are counted. The rates
are those between two units while nothing happens: of the launch from its first to its last, on Ray from the second
driver's first until an actor is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ldm_vae import LatentDataset, open_images, verify
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.latent_store.format.layout import MANIFEST, UNITS
from ldm_vae.latent_store.format.manifest import place_of
from ldm_vae.latent_store.storage.places import Place, storage_at

from .speed.timing import machine

SIDE, TAR = 32, 10_000  # pixels; images of a tar
BUCKET = "latents"
PATIENCE = 600.0  # seconds in which a stopped driver ends
TRIES = 5  # of a node's start


def write_data(folder: Path, images: int) -> None:
    """Smooth random pictures as PNG in tar shards."""
    folder.mkdir(parents=True)
    for first in Progress(range(0, images, TAR), desc="write", unit="tar", leave=False):
        with tarfile.open(folder / f"{first // TAR:05d}.tar", "w") as tar:
            for index in range(first, min(first + TAR, images)):
                coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(file, "PNG")
                entry = tarfile.TarInfo(f"{index:08d}.png")
                entry.size = file.tell()
                file.seek(0)
                tar.addfile(entry, file)


@contextlib.contextmanager
def loopback_s3() -> Iterator[str]:
    """A bucket in a server of this process, as long as the block runs; its URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield f"s3://{BUCKET}/store"
    finally:
        server.stop()


class Watched:
    """An encode as a program of its own, and the moments at which its units were seen to be done."""

    def __init__(self, store: Place, words: list[str]) -> None:
        self._storage = storage_at(store)
        self._before = self.units()
        self.seen: list[tuple[float, int]] = []
        self._process = subprocess.Popen([sys.executable, "-m", "ldm_vae", "encode", *words], start_new_session=True)

    def units(self) -> int:
        return len(self._storage.names(UNITS))

    def wait(self, units: int | None = None) -> None:
        """Until so many units are done; or to the program's end, which must be a good one."""
        while self._process.poll() is None:
            done = self.units()
            if done > (self.seen[-1][1] if self.seen else self._before):
                self.seen.append((time.monotonic(), done))
            if units is not None and done >= units:
                return
            time.sleep(0.1)
        if units is not None or self._process.returncode:
            raise WorkError(f"the encode ended early, with status {self._process.returncode}")

    def stop(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        if self._process.wait(PATIENCE) != 128 + signal.SIGINT:
            raise WorkError(f"Ctrl-C: expected status 130, got {self._process.returncode}")

    def rate(self) -> float:
        """Units a second between the first and the last that were seen so far."""
        (first, before), (last, after) = self.seen[0], self.seen[-1]
        return (after - before) / (last - first) if last > first else float("nan")


def on_ray(store: Place, words: list[str], units: int) -> dict[str, Any]:
    """Encode on a cluster, with what happens to it; the rate in units a second, and seconds of all."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = _patiently(lambda: Cluster(initialize_head=True, head_node_args=node))
    try:
        lost = _patiently(lambda: cluster.add_node(**node))
        start, words = time.monotonic(), [*words, "--engine", "ray", "--ray_address", cluster.address]
        first = Watched(store, [*words, "--actors", "3"])
        first.wait(units // 4)
        print(f"a node is killed ({units // 4} of {units} units)", file=sys.stderr)
        cluster.remove_node(lost, allow_graceful=False)
        _patiently(lambda: cluster.add_node(**node))
        first.wait(units // 2)
        print("the driver is stopped and started again", file=sys.stderr)
        first.stop()
        kept = first.units()
        second = Watched(store, [*words, "--actors", "2"])
        second.wait(3 * units // 4)
        rate = second.rate()
        print("a process is killed", file=sys.stderr)
        actors = [one for one in psutil.process_iter() if one.name().startswith("ray::Actor.enc") and _ours(one)]
        actors[0].kill()
        second.wait()
        return {"units_per_s": rate, "seconds": time.monotonic() - start, "units_kept_by_ctrl_c": kept}
    finally:
        session = cluster.head_node.get_session_dir_path()
        cluster.shutdown()
        for left in psutil.Process().children(recursive=True):  # of a node that did not come up
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(session, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """Start a node; on a busy machine Ray gives up after 30 s, and a second time is faster."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Exception):
            return start()
    return start()


def _ours(process: psutil.Process) -> bool:
    return os.getpid() in [parent.pid for parent in process.parents()]


def check(store: Place, local: Path, keys: list[str]) -> None:
    """Raises WorkError unless `store` has the bytes of the local one, and each key once."""
    if problems := verify(store):
        raise WorkError(f"verify: {problems[0]}")
    one, other = storage_at(store), storage_at(local)
    for name in [MANIFEST, *other.names(UNITS)]:  # which have the checksums of the other files
        if one.read(name) != other.read(name):
            raise WorkError(f"{name}: is not that of the local store")
    data = LatentDataset(local, columns=("key",))
    if [data[index]["key"] for index in range(len(data))] != keys:
        raise WorkError("keys: expected each once, in their order")


def main() -> None:
    parser = Parser(program="eval.ray_cluster", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="for data, stores and ray_cluster.json")
    parser.add_argument("--images", type=int, default=100_000, help="images (default 100,000)")
    parser.add_argument("--shard_size", type=int, default=1000, help="images of a unit (default 1000)")
    parser.add_argument("--batch_size", type=int, default=50, help="images of a batch (default 50)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--store", metavar="OUT", help="folder or URL, new (default: in DIR)")
    place.add_argument("--loopback_s3", action="store_true", help="the store in an S3 server that is started for it")
    options = parser.parse_args()
    folder, units = Path(options.output), -(-options.images // options.shard_size)
    if units < 16:
        raise UsageError(f"--images: expected at least 16 units of --shard_size, got {units}")
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1).build().eval()
    vae.save_pretrained(folder / "vae")
    write_data(folder / "data", options.images)
    source = open_images(folder / "data", vae)
    keys = [source.key(index) for index in range(len(source))]
    words = [str(folder / "vae"), str(folder / "data")]
    sizes = ["--resolution", str(SIDE), "--shard_size", str(options.shard_size)]
    sizes += ["--batch_size", str(options.batch_size)]
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(loopback_s3()) if options.loopback_s3 else options.store
        store = place_of(url or folder / "store")
        local = Watched(folder / "local", [*words, str(folder / "local"), *sizes])
        local.wait()
        found = on_ray(store, [*words, str(store), *sizes], units)
        check(store, folder / "local", keys)
    rates = {"ray": found.pop("units_per_s") * options.shard_size, "local": local.rate() * options.shard_size}
    found |= {"machine": machine(), "store": str(store), "images": len(keys), "images_per_s": rates}
    atomic_io.replace(folder / "ray_cluster.json", atomic_io.data(json.dumps(found, indent=2).encode()))
    print(
        f"{len(keys):,} images, each once, equal bytes; a node, a driver and a process lost\n"
        f"Ray {rates['ray']:,.0f} images/s, one launch {rates['local']:,.0f}: {rates['ray'] / rates['local']:.2f}"
    )


if __name__ == "__main__":
    run_program(main)
