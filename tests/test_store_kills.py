"""Killed at any moment, by any number of processes: the finished store is the one that was never interrupted.

In the suite (slow): 24 kills of forked children at random moments, and 4 of the real program under its launcher. The
torture, as often as one likes:

    python tests/test_store_kills.py --kills 100
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # when it is run as a program

from conftest import write_images
from forked import forkserver
from test_store_writing import SETTINGS, Pictures, tree

from ldm_vae import publish
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.writing import Processes

ROOT = Path(__file__).parent.parent
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def vae() -> Any:
    import torch

    from ldm_vae.autoencoder import AutoencoderConfig

    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


def source(count: int) -> Pictures:
    return Pictures(count, bad=(5, 31), broken=(17,))


def child(out: str, rank: int, count: int, workers: int, update: int) -> None:
    """Encode `count` pictures, or update a store to `update` of them."""
    import torch

    torch.set_num_threads(1)
    processes = Processes(rank, count)
    write_store(
        vae(), source(update or 60), out, **SETTINGS, processes=processes, num_workers=workers, update=bool(update)
    )


def torture(out: Path, kills: int, seed: int, *, update: int = 0) -> int:
    """Start children with random numbers of processes and workers, kill each after a random time, until `kills` were
    killed while they worked; then let one finish. Returns how many children it took."""
    draw = random.Random(seed)
    context = forkserver()
    killed = started = 0
    longest = 0.5  # seconds until the kill, follows what a child needs
    while killed < kills:
        count = draw.choice([1, 1, 2, 3])
        ranks = [
            context.Process(target=child, args=(str(out), rank, count, draw.choice([0, 0, 1]), update))
            for rank in range(1, count)
        ] or [context.Process(target=child, args=(str(out), 0, 1, 0, update))]
        for rank in ranks:
            rank.start()
        started += len(ranks)
        time.sleep(draw.uniform(0.0, longest))
        alive = [rank for rank in ranks if rank.is_alive()]
        for rank in alive:
            assert rank.pid is not None
            os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join()
            assert rank.exitcode in (0, -signal.SIGKILL)
        killed += len(alive)
        longest = max(0.02, longest * (1.15 if alive else 0.8))
        if update == 0 and (out / "manifest.json").is_file() and read_manifest(out).complete:
            shutil.rmtree(out)  # a finished store is never touched again: the next round begins anew
        elif len(list((out / "units").glob("*.json"))) > 6 and draw.random() < 0.5:
            undo(out, draw)
    child(str(out), 0, 1, 0, update)
    return started


def undo(out: Path, draw: random.Random) -> None:
    """Take some finished units away again, so that there is work for the next to be killed in."""
    for record in draw.sample(sorted((out / "units").glob("*.json"))[:7], 4):
        stem = out / "shards" / record.stem
        if draw.random() < 0.5:
            stem.with_suffix(".safetensors").unlink(missing_ok=True)
        record.unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_two_dozen_times_at_random_moments(tmp_path: Path) -> None:
    child(str(tmp_path / "whole"), 0, 1, 0, 0)
    torture(tmp_path / "killed", 24, seed=0)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert verify(tmp_path / "killed") == []
    keys = [LatentDataset(tmp_path / "killed", columns=("key",))[index]["key"] for index in range(57)]
    assert keys == [source(60).key(index) for index in range(60) if index not in (5, 17, 31)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_update_killed_at_random_moments(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        child(str(tmp_path / name), 0, 1, 0, 0)
    child(str(tmp_path / "whole"), 0, 1, 0, 140)
    context = forkserver()
    draw, killed = random.Random(1), 0
    for attempt in range(200):
        process = context.Process(target=child, args=(str(tmp_path / "killed"), 0, 1, 0, 140))
        process.start()
        process.join(draw.uniform(0.0, 0.2 + 0.15 * attempt))
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        elif process.exitcode == 0:
            break
        assert len(LatentDataset(tmp_path / "killed")) in (57, 137), "a reader sees the old store or the new one"
    assert killed >= 4
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


# --- the real program -------------------------------------------------------------------------------------------------


def command(processes: int, folder: Path, out: Path) -> list[str]:
    words = ["-m", "ldm_vae", "encode", str(folder / "vae"), str(folder / "images"), str(out)]
    options = ["--resolution", "32", "--batch_size", "4", "--shard_size", "8", "--num_workers", "1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--num_processes", str(processes)]
    return [*(launcher if processes > 1 else [sys.executable]), *words, *options]


def start(processes: int, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("LOCAL_RANK", None)
    return subprocess.Popen(command(processes, folder, out), env=environment, cwd=folder, start_new_session=True)


def kill_at(process: subprocess.Popen[bytes], out: Path, units: int, *, whole_tree: bool) -> list[psutil.Process]:
    """Kill as soon as `units` are done; the launcher alone or all; returns whoever is left."""
    deadline = time.monotonic() + 120
    while len(list((out / "units").glob("*.json"))) < units and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family if whole_tree else family[:1]:
        member.kill()
    process.wait()
    return family


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_program_killed_under_its_launcher_and_finished_with_other_numbers(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    write_images(tmp_path / "images", 600)
    whole = start(1, tmp_path, tmp_path / "whole")
    assert whole.wait() == 0
    out, left = tmp_path / "killed", []
    left += kill_at(start(2, tmp_path, out), out, 4, whole_tree=False)  # its orphans go on beside the next launch
    left += kill_at(start(2, tmp_path, out), out, 16, whole_tree=True)
    left += kill_at(start(3, tmp_path, out), out, 30, whole_tree=False)
    left += kill_at(start(1, tmp_path, out), out, 45, whole_tree=True)
    done = len(list((out / "units").glob("*.json")))
    assert done < 75, "everything was done before the last kill: nothing was tested"
    one = tmp_path / "one"
    copy = subprocess.run(["cp", "-r", str(out), str(one)], check=False)  # an orphan may still be at work
    assert copy.returncode in (0, 1)
    assert start(3, tmp_path, out).wait() == 0
    assert start(1, tmp_path, one).wait() == 0
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == [], "orphans of a killed launcher stop by themselves"
    for path in out.rglob("*"):
        assert not publish.is_temporary(path) or path.unlink() is None  # an orphan that was killed in its last write
    assert tree(out) == tree(one) == tree(tmp_path / "whole")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Kill the writer of a latent store at random moments and compare.")
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        child(f"{place}/whole", 0, 1, 0, 0)
        begun = time.monotonic()
        children = torture(Path(place) / "killed", chosen.kills, chosen.seed)
        same = tree(Path(place) / "killed") == tree(Path(place) / "whole")
        seconds = time.monotonic() - begun
    print(
        f"{chosen.kills} kills of {children} writers in {seconds:.0f} s: {'identical bytes' if same else 'DIFFERENT'}"
    )
    sys.exit(not same)
