"""Runs of train.autoencoder on a tiny config, and what is read from their folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from fork_server import Child, Finished, fork
from kills import ranks
from videos import write_video

from train import autoencoder as training_program

TINY = {
    "resolution": 32,
    "train_batch_size": 2,
    "learning_rate": 1e-4,
    "max_train_images": 80,
    "log_every_images": 8,
    "checkpoint_every_images": 16,
    "checkpoints_total_limit": 3,
    "dataloader_num_workers": 0,
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "losses": {"l1": {"weight": 1.0}, "kl": {"weight": 1e-6}},
    "adversary": {"weight": 0.5, "start_images": 24, "warmup_images": 8},
    "discriminator": {"kind": "patchgan", "width": 8, "layers": 1},
}

# the same in half of the updates: the adversary comes in at the seventh of twenty
SHORT: dict[str, object] = {
    "max_train_images": 40,
    "log_every_images": 4,
    "checkpoint_every_images": 8,
    "adversary": {"weight": 0.5, "start_images": 12, "warmup_images": 4},
}

OF_CLIPS: dict[str, object] = {
    "losses": {
        "l1": {}, "ssim": {"frames": 2}, "time": {"kind": "temporal_difference"}, "kl": {"weight": 1e-6},
    },
    "discriminator": {"kind": "patchgan", "width": 8, "layers": 1, "dimensions": 3},
}  # fmt: skip


def write_videos(folder: Path, count: int, frames: int) -> Path:
    """Lossless videos of noise that moves, 32 x 48 px."""
    folder.mkdir(parents=True)
    for number in range(count):
        still = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        pictures = [np.roll(still, place * (number + 1), axis=1) for place in range(frames)]
        write_video(folder / f"{number}.mkv", frames, pictures=pictures)
    return folder


def write_config(folder: Path, images: Path, **changes: object) -> Path:
    settings = TINY | {"output_dir": str(folder / "run"), "data": {"kind": "folder", "path": str(images)}} | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(config: Path, *flags: str) -> Finished:
    return start(config, *flags).wait()


def start(config: Path, *flags: str) -> Child:
    return fork(training_program.main, [str(config), *flags])


def run_two(config: Path) -> None:
    """Two processes with the environment of a launch, without the launcher's and two interpreters' imports."""
    for done in [rank.wait() for rank in ranks(training_program.main, [str(config)], 2)]:
        assert done.returncode == 0, done.stderr


def metrics(run_folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without their times, which no two runs share."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    took = [line.pop("seconds") for line in lines]
    assert took == sorted(took)
    return lines


def newest(run_folder: Path) -> Path:
    return max((run_folder / "checkpoints").glob("images-*"))


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Both networks, both optimisers, averaged weights, schedules, monitor and log, to the bit."""
    for file in ("tensors.safetensors", "state.json"):
        assert (newest(ours) / file).read_bytes() == (newest(theirs) / file).read_bytes(), file
    assert metrics(ours) == metrics(theirs)


def one_sentence(done: Finished, status: int) -> str:
    """The error as a user must see it: the status, one line on stderr, no traceback."""
    assert done.returncode == status, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]
