"""Train, encode and read, round after round in one process, and see that memory, open files and threads stay level.

    python -m tests.soak --minutes 30            # from the root of the repo; prints a line a round

A round is the training program, `ldm-vae encode` with a data worker, and two epochs of the store's loader; after it the
resident memory, the open files and the threads are noted. The first rounds (--warm_up) fill caches and do not count.
Level means: a straight line through the memory of the others rises by less than 5 % over all of them, and neither files
nor threads are ever more than in the first of them. The exit status is 1 if they are not.
"""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # run with -m from the root, without pytest's `pythonpath`

import numpy as np
import psutil
from cli_call import run_cli
from images import write_images
from training_runs import write_config

from ldm_vae.core.request import Parser
from ldm_vae.latent_store import LatentDataset
from train import autoencoder

RISE = 0.05  # of the memory, over the whole time


@dataclass(frozen=True)
class Sample:
    """After one round."""

    seconds: float
    megabytes: float
    files: int
    threads: int


def one_round(place: Path) -> int:
    """Everything once; how many latents were read."""
    config = write_config(place, place / "images", max_train_images=40)
    with mock.patch.object(sys, "argv", ["train.autoencoder", str(config)]):
        autoencoder.main()
    run, store = place / "run", place / "latents"
    size = ("--resolution", 32, "--batch_size", 4, "--shard_size", 8, "--num_workers", 1)
    assert run_cli("encode", run / "vae", place / "images", store, *size) == 0
    loader = LatentDataset(store).loader(4)
    latents = sum(len(batch["latents"]) for _ in range(2) for batch in loader)
    for folder in (run, store):
        shutil.rmtree(folder)
    return latents


def soak(minutes: float, warm_up: int) -> list[Sample]:
    """A sample of each round after the warm-up; there are at least three."""
    process, samples, begun = psutil.Process(), list[Sample](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        write_images(Path(folder) / "images", 24)
        number = 0
        while len(samples) < 3 or time.monotonic() < begun + 60 * minutes:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                latents = one_round(Path(folder))
            assert latents == 48, "two epochs of 24 images"
            gc.collect()
            megabytes = process.memory_info().rss / 2**20
            now = Sample(time.monotonic() - begun, megabytes, process.num_fds(), process.num_threads())
            number += 1
            kept = number > warm_up
            if kept:
                samples.append(now)
            print(
                f"round {number:4}  {now.seconds:7.0f} s  {now.megabytes:8.1f} MB  {now.files:4} files  "
                f"{now.threads:3} threads{'' if kept else '  (warm-up)'}",
                flush=True,
            )
    return samples


def verdict(samples: Sequence[Sample]) -> tuple[bool, str]:
    """Whether all three are level, and the sentence that says so."""
    seconds, memory = np.array([one.seconds for one in samples]), np.array([one.megabytes for one in samples])
    slope = float(np.polyfit(seconds, memory, 1)[0])
    rise = slope * (seconds[-1] - seconds[0]) / memory.mean()
    level = bool(rise < RISE)
    said = [f"memory {memory.mean():.0f} MB, rising by {rise:+.2%} (at most {RISE:.0%})"]
    for name in ("files", "threads"):
        counts = [getattr(one, name) for one in samples]
        level = level and max(counts) <= counts[0]
        said.append(f"{name} {counts[0]}, at most {max(counts)}")
    return level, f"{len(samples)} rounds in {seconds[-1] - seconds[0]:.0f} s: {'; '.join(said)}"


def main() -> int:
    parser = Parser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--warm_up", type=int, default=5, metavar="ROUNDS", help="rounds that do not count (5)")
    chosen = parser.parse_args()
    level, said = verdict(soak(chosen.minutes, chosen.warm_up))
    print(f"{said}: {'level' if level else 'NOT LEVEL'}")
    return 0 if level else 1


if __name__ == "__main__":
    sys.exit(main())
