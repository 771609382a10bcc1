"""The training program as a user runs it: one process and two, killed and resumed, called wrongly."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from images import write_images
from kills import fork_until
from launcher import launch_machines
from safetensors.torch import load_file
from training_runs import SHORT, assert_same_run, metrics, newest, one_sentence, run, run_two, write_config

from ldm_vae.core.errors import SIGNALS
from train import autoencoder as training_program


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 11)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(write_config(folder, images, **SHORT))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_what_other_programs_rely_on(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["images"] for line in lines] == list(range(4, 41, 4))
    assert lines[0]["num_processes"] == 1
    assert "adversary/weight" in lines[-1] and "adversary/weight" not in lines[0]
    assert all("kl_nats_per_image" in line for line in lines)
    assert (finished / "config.yaml").is_file() and (finished / "report" / "index.html").is_file()
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["images-000000024", "images-000000032", "images-000000040"]
    vae = AutoencoderKL.from_pretrained(finished / "vae")
    ema = load_file(newest(finished) / "tensors.safetensors")
    for name, value in vae.state_dict().items():
        assert torch.equal(value, ema[f"ema.{name}"]), name
    assert vae.config.scaling_factor not in (1.0, 0.18215)  # measured
    assert vae.config.shift_factor is None and vae.config.latents_mean is None


def test_the_same_command_on_a_finished_run_changes_nothing(finished: Path, images: Path) -> None:
    before = {path: path.read_bytes() for path in (finished / "checkpoints").rglob("*") if path.is_file()}
    lines = metrics(finished)
    done = run(write_config(finished.parent, images, **SHORT))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert {path: path.read_bytes() for path in (finished / "checkpoints").rglob("*") if path.is_file()} == before
    assert metrics(finished) == lines


def test_killed_and_resumed_is_bit_equal(finished: Path, images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, **SHORT)
    victim = fork_until(tmp_path / "run/checkpoints/images-000000016", training_program.main, [str(config)])
    victim.kill(signal.SIGKILL)
    assert victim.wait().returncode == -signal.SIGKILL
    done = run(config, "--dataloader_num_workers", "2")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(finished: Path, images: Path, tmp_path: Path, number: int, status: int) -> None:
    config = write_config(tmp_path, images, **SHORT)
    victim = fork_until(tmp_path / "run/metrics.jsonl", training_program.main, [str(config)])
    victim.kill(number)
    victim.kill(signal.SIGCONT)
    stopped = victim.wait()
    assert stopped.returncode == status, stopped.stderr
    assert f"stopped by {SIGNALS[number]}, saved {newest(tmp_path / 'run')}; the same command resumes" in stopped.stdout
    assert not (tmp_path / "run" / "vae").exists()
    assert run(config).returncode == 0
    assert (newest(tmp_path / "run") / "tensors.safetensors").read_bytes() == (
        newest(finished) / "tensors.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_another_config_is_refused_and_a_longer_run_is_not(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, max_train_images=8)
    assert run(config).returncode == 0
    said = one_sentence(run(config, "--losses.kl.weight", "1e-3"), 2)
    assert "holds a run of another config: losses.kl.weight (was 1e-06, now 0.001)" in said
    done = run(config, "--max_train_images", "16")
    assert done.returncode == 0 and "resumed from" in done.stdout
    assert newest(tmp_path / "run").name == "images-000000016"


def test_a_shift_that_the_pipelines_of_such_latents_ignore_is_said(images: Path, tmp_path: Path) -> None:
    done = run(write_config(tmp_path, images, max_train_images=8, normalisation="shift"))
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stdout and "ignore shift_factor" in done.stdout


def test_nan_stops_the_run_and_names_the_interval(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, learning_rate=1e15, checkpoint_every_images=8)
    said = one_sentence(run(config), 1)
    assert "became NaN or infinite between" in said and "images" in said
    assert "is kept" in said or "no checkpoint yet" in said


# --- several processes ------------------------------------------------------------------------------------------------


PARALLEL = {  # 9 updates, the adversary from the fourth on
    "max_train_images": 36, "log_every_images": 4, "checkpoint_every_images": 36,
    "adversary": {"weight": 0.5, "start_images": 12, "warmup_images": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of global batch 4 on one process."""
    folder = tmp_path_factory.mktemp("one")
    done = run(write_config(folder, images, train_batch_size=4, **PARALLEL))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same_training(one: Path, two: Path) -> None:
    """Equal losses, adaptive weights and weights, to the rounding of fp32."""
    ours, theirs = metrics(one), metrics(two)
    assert (ours[0].pop("num_processes"), theirs[0].pop("num_processes")) == (1, 2)
    assert "adversary/weight" in ours[-1]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    weights = [load_file(newest(run_folder) / "tensors.safetensors") for run_folder in (one, two)]
    for name, value in weights[0].items():
        # two biases have a gradient of rounding alone, which Adam divides by itself: a key's (softmax does not see it)
        # and the critic's last under hinge while no logit is beyond 1 (it raises real and fake alike)
        if name.startswith(("autoencoder", "discriminator.", "ema")) and not name.endswith(("to_k.bias", "5.bias")):
            distance = (value - weights[1][name]).norm() / value.norm().clamp_min(1e-6)
            assert distance < 1e-5, (name, distance)


@pytest.mark.slow
def test_two_processes_train_one_model_the_same_as_one(one_process: Path, images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, train_batch_size=2, **PARALLEL)
    run_two(config)
    assert_same_training(one_process, tmp_path / "run")


@pytest.mark.slow
def test_two_machines_train_one_model_the_same_as_one(one_process: Path, images: Path, tmp_path: Path) -> None:
    """Each with Accelerate's own launcher."""
    config = write_config(tmp_path, images, train_batch_size=2, **PARALLEL)
    for status, said in launch_machines(["-m", "train.autoencoder", str(config)]):
        assert status == 0, said
    assert_same_training(one_process, tmp_path / "run")


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(one_process: Path, images: Path, tmp_path: Path) -> None:
    """The global order of the images is kept: the resumed run logs what the undisturbed one does."""
    config = write_config(tmp_path, images, train_batch_size=2, **PARALLEL | {"max_train_images": 16})
    run_two(config)
    text = (
        config.read_text()
        .replace("train_batch_size: 2", "train_batch_size: 4")
        .replace("max_train_images: 16", "max_train_images: 36")
    )
    config.write_text(text)
    resumed = run(config)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    ours, theirs = metrics(one_process), metrics(tmp_path / "run")
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


# --- called wrongly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"data": {"kind": "folder", "path": "no/such/folder"}}, 2, "no/such/folder"),
        ({"resolution": 33}, 2, "resolution: expected a positive multiple of f = 2, got 33"),
        ({"init_from": "no/such/vae/folder"}, 2, "VAE no/such/vae/folder"),
        ({"losses": {"kl": {}}}, 2, "losses: expected at least one term on pixels"),
        ({"model": {"block_out_channels": [8, 12], "norm_num_groups": 8}}, 2, "expected multiples of norm_num_groups"),
        ({"discriminator": None}, 2, "discriminator: is missing although adversary.weight > 0"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    images: Path, tmp_path: Path, changes: dict[str, object], status: int, says: str
) -> None:
    done = run(write_config(tmp_path, images, **changes))
    assert says in one_sentence(done, status)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_missing_asset_without_network_is_one_sentence(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    losses = {"l1": {}, "lpips": {"net": "alex"}}
    said = one_sentence(run(write_config(tmp_path, images, losses=losses)), 1)
    assert "LPIPS-alex" in said and "ldm-vae assets lpips --net alex" in said
    assert not (tmp_path / "run").exists()


def test_data_without_a_usable_image_fails_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no" in one_sentence(run(write_config(tmp_path, tmp_path / "empty")), 1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"not a picture")
    assert "a.png" in one_sentence(run(write_config(tmp_path, tmp_path / "bad")), 1)


def test_an_unreadable_image_goes_to_quarantine_and_the_run_goes_on(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and then nothing")
    done = run(write_config(tmp_path, images, max_train_images=16))
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in entries] == ["broken.jpg"] and entries[0]["reason"]
    assert "1 of 6 images could not be used" in done.stdout


@pytest.mark.slow
def test_dry_run_prints_the_resolved_config_and_writes_nothing(images: Path, tmp_path: Path) -> None:
    done = run(write_config(tmp_path, images), "--dry_run", "--losses.kl.weight", "1e-5")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert resolved["losses"]["kl"]["weight"] == 1e-5 and resolved["seed"] == 0
    assert not (tmp_path / "run").exists()
