"""The training program under what happens to long runs: kills at any moment, a full disk, a damaged checkpoint, NaN,
fewer images than processes. However it was disturbed, it ends as the undisturbed run does, to the bit."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from images import write_images
from kills import Reaper, fork_until
from repository import ROOT
from safetensors.torch import load_file
from training_runs import (
    OF_CLIPS,
    SHORT,
    assert_same_run,
    metrics,
    newest,
    one_sentence,
    run,
    run_two,
    start,
    write_config,
    write_videos,
)

from train import autoencoder as training_program


@pytest.fixture(scope="module")
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, or as `clips` four videos and two images."""
    folder = tmp_path_factory.mktemp("data") / (name := getattr(request, "param", "images"))
    if name == "images":
        return write_images(folder, 11)
    for path in write_images(write_videos(folder, 4, 7) / "stills", 2).iterdir():
        path.rename(folder / path.name)
    return folder


def config_of(folder: Path, images: Path) -> Path:
    """A run's config; on clips with terms and a discriminator of clips, and frames that are chosen."""
    if images.name == "images":
        return write_config(folder, images, **SHORT)
    of_clips = SHORT | OF_CLIPS | {"data": {"kind": "folder", "path": str(images), "frames": 5}}
    return write_config(folder, images, **of_clips)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """20 updates with the adversary from the seventh on."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(config_of(folder, images))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("images", ["images", "clips"], indirect=True)
def test_killed_at_random_moments_it_ends_bit_equal(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    reaper = Reaper(random.Random(0), longest=2.0)
    config = config_of(tmp_path, images)
    while reaper.kills < 4:  # a run that came to its end is made again
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ended = None
        while ended != 0:
            victim = start(config, "--dataloader_num_workers", str(reaper.draw.choice([0, 0, 2])))
            ended = reaper.strike([victim])[0].returncode
            assert ended in (0, -signal.SIGKILL)
        assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_sentence_and_loses_nothing(
    undisturbed: Path, images: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, images, **SHORT)
    victim = fork_until(tmp_path / "run/checkpoints/images-000000016", training_program.main, [str(config)])
    # no file may grow beyond 30 kB from now on, as on a disk that has so much left
    resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    victim.kill(signal.SIGCONT)
    said = one_sentence(victim.wait(), 1)
    assert "could not be written" in said and "the last good one is images-" in said
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.name.startswith("images-")]
    done = run(config)
    assert done.returncode == 0 and "resumed from" in done.stdout
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, **SHORT)
    assert run(config, "--max_train_images", "24").returncode == 0
    tensors = newest(tmp_path / "run") / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    done = run(config)
    assert done.returncode == 0, done.stderr
    assert "images-000000024 is damaged (tensors.safetensors does not match its checksum)" in done.stdout
    assert "resumed from" in done.stdout and "images-000000016 at 16 images" in done.stdout
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_newest(images: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, images, checkpoints_total_limit=1, validate_every_images=8, validation_images=4,
        validation_metrics=["psnr"], best_metric="psnr", validation_data={"kind": "folder", "path": str(images)},
        learning_rate=1e-3, ema_halflife_images=2, lr_warmup_images=24, **SHORT,
    )  # fmt: skip
    # the rate grows and the adversary comes in: some validation in the middle may be the best, whichever it is is kept
    assert run(config).returncode == 0
    scores = {
        line["images"]: line["validation/psnr"] for line in metrics(tmp_path / "run") if "validation/psnr" in line
    }
    best = json.loads((newest(tmp_path / "run") / "state.json").read_text())["info"]["best"]
    assert len(scores) == 5 and best["score"] == max(scores.values())
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"images-000000040", best["checkpoint"]}


NAN_TERM = """
from typing import Literal
import torch
from torch import nn
from ldm_vae.losses import TermConfig

class Term(nn.Module):
    domain = "pixels"
    calls = 0

    def forward(self, pixels, target):
        self.calls += 1
        return (pixels - target).square().mean() * (float("nan") if self.calls == 7 else 1.0)

class Config(TermConfig):
    kind: Literal["sometimes_nan"] = "sometimes_nan"

    def build(self):
        return Term()
"""


@pytest.mark.slow
def test_nan_in_a_term_stops_or_is_skipped_and_counted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").touch()
    (tmp_path / "my_lab" / "sometimes_nan.py").write_text(NAN_TERM.replace('"sometimes_nan"', '"my_lab.sometimes_nan"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    losses = {"l1": {"weight": 1.0}, "odd": {"kind": "my_lab.sometimes_nan"}}
    config = write_config(tmp_path, images, losses=losses, **SHORT)
    said = one_sentence(run(config), 1)
    assert "loss/odd" in said and "between 12 and 16 images" in said and "images-000000008 is kept" in said
    assert newest(tmp_path / "run").name == "images-000000008"
    (tmp_path / "skipping").mkdir()
    done = run(write_config(tmp_path / "skipping", images, losses=losses, on_nan="skip", **SHORT))
    assert done.returncode == 0, done.stderr
    skipped = [line["images"] for line in metrics(tmp_path / "skipping" / "run") if line["skipped/autoencoder"] > 0]
    assert skipped == [16]  # the interval of the seventh update


# --- launch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("two_nodes_of_eight", 2, 16), ("two_cpu_processes", 1, 2)],
)
def test_accelerate_reads_the_launch_files(name: str, machines: int, processes: int) -> None:
    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    settings = load_config_from_file(str(path))
    assert (settings.num_machines, settings.num_processes) == (machines, processes)
    assert settings.use_cpu == (name == "two_cpu_processes")
    assert f"configs/accelerate/{name}.yaml" in (ROOT / "README.md").read_text()
    assert f"--config_file configs/accelerate/{name}.yaml" in path.read_text()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused_with_the_reason(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    said = one_sentence(run(write_config(tmp_path, images)), 2)
    assert f"{name} is not supported; plain DDP is enough" in said and "1.3 GB" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_image_for_two_processes(tmp_path: Path) -> None:
    """Fewer images than processes, and five validation images for two: nobody waits for anybody."""
    images = write_images(tmp_path / "images", 1)
    heldout = write_images(tmp_path / "heldout", 5)
    config = write_config(
        tmp_path, images, max_train_images=10, checkpoint_every_images=8, validate_every_images=8, validation_images=5,
        validation_metrics=["psnr"], best_metric="psnr", validation_data={"kind": "folder", "path": str(heldout)},
        normalisation_images=1,
    )  # fmt: skip
    run_two(config)
    lines = metrics(tmp_path / "run")
    assert lines[0]["num_processes"] == 2
    assert lines[-1]["images"] == 12  # the first whole global batch of four at or behind ten
    assert load_file(newest(tmp_path / "run") / "tensors.safetensors")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_train_images"] == 10
