"""train.diffusion as a user runs it: on a store with labels and without, killed and resumed, called wrongly."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusion_runs import run, write_config, write_materials
from kills import fork_until, ranks
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file
from sentences import refused
from training_runs import assert_same_run, metrics, newest, one_sentence

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import SIGNALS, UsageError
from ldm_vae.diffusion.config import DiffusionTraining, open_latents
from ldm_vae.diffusion.generator import Generator
from ldm_vae.latent_store import LatentDataset
from train import diffusion as program


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_materials(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: Path, clip_folder: Path) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ("--sample_every_images", "32", "--measure_images", "3", "--clip", str(clip_folder))
    done = run(write_config(folder, home / "latents"), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 images each: samples") == 2
    return folder / "run"


def test_a_run_leaves_what_other_programs_rely_on(finished: Path, home: Path) -> None:
    lines = metrics(finished)
    assert [line["images"] for line in lines] == list(range(8, 49, 8))
    assert {"loss/total", "gradient_norm/denoiser", "learning_rate"} <= set(lines[-1])
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["images-000000016", "images-000000032", "images-000000048"]
    grids = sorted(path.name for path in (finished / "samples").iterdir())
    assert grids == ["images-000000032.png", "images-000000048.png", "originals.png"]
    found = json.loads((finished / "report" / "diffusion.json").read_text())
    assert [*found["grids"], "originals.png"] == grids
    # the names of their folders, where the store has them, not their numbers
    assert found["classes"] == ["cats", "dogs"] and found["labels"] == ["cats", "dogs"] * 2 and found["columns"] == 2
    assert {"samples", "field", "noise"} <= set(found["distances"]) and found["distances"]["n"] == 3
    assert found["cmmd"]["metric"] == "cmmd" and found["cmmd"]["noise"] > 0
    page = (finished / "report" / "index.html").read_text()
    assert all(words in page for words in ("<h3>cats</h3>", "<h3>dogs</h3>", "from the store", "dogs, samples"))
    assert "CMMD" in page and "ldm-vae diffuse" in page and "ldm-vae train" not in page
    # what is loaded draws the same pictures as the run did, from the averaged weights
    ema = load_file(newest(finished) / "tensors.safetensors")
    generator = Generator.load(finished, load_autoencoder(home / "vae"))
    for name, value in generator.denoiser.network.state_dict().items():
        assert torch.equal(value, ema[f"ema.{name}"]), name
    assert generator.normalisation == LatentDataset(home / "latents").normalisation
    last = np.asarray(Image.open(finished / "samples" / grids[1]))
    top = found["gap"] + found["strip"]
    first = ((generator.pixels([0])[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(last[top : top + 16, 4:20].astype(int) - first.astype(int)).max() <= 1
    with refused(UsageError, "label"):
        generator.pixels([0], label="birds")


def test_originals_are_of_the_class_that_they_stand_for(home: Path) -> None:
    latents = open_latents(DiffusionTraining(output_dir=Path("unused"), latents=str(home / "latents")))
    stored = LatentDataset(home / "latents", columns=("label",))
    by_class = {label: [] for label in latents.classes}
    for row in (stored[index] for index in range(len(stored))):
        by_class[row["label"]].append(row["latents"])
    found = latents.originals(14)
    for key, latent in enumerate(found):
        own = by_class[latents.classes[key % 2]]
        assert torch.equal(latent, own[key // 2 % len(own)]), key  # five cats: the sixth is the first again
    by_key = {"output_dir": Path("unused"), "latents": str(home / "latents"), "label_column": "key"}
    names = open_latents(DiffusionTraining(**by_key)).names
    assert names[0] == "cats/img_0000.png"  # another folder has a file of this name


def test_the_pages_snippet_samples_from_a_run(finished: Path, home: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusion.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"run": finished, "vae": home / "vae"}
    exec(compile(snippet, "docs/diffusion.md", "exec"), names)
    assert names["pixels"].shape == names["guided"].shape == (8, 3, 16, 16)
    assert torch.equal(names["generator"].pixels(range(8)), names["pixels"])


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(finished: Path, home: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, home / "latents")
    victim = fork_until(tmp_path / "run/checkpoints/images-000000016", program.main, [str(config)])
    victim.kill(signal.SIGKILL)
    assert victim.wait().returncode == -signal.SIGKILL
    done = run(config, "--dataloader_num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(finished: Path, home: Path, tmp_path: Path, number: int, status: int) -> None:
    config = write_config(tmp_path, home / "latents")
    victim = fork_until(tmp_path / "run/metrics.jsonl", program.main, [str(config)])
    victim.kill(number)
    victim.kill(signal.SIGCONT)
    stopped = victim.wait()
    assert stopped.returncode == status, stopped.stderr
    assert f"stopped by {SIGNALS[number]}, saved {newest(tmp_path / 'run')}; the same command" in stopped.stdout
    assert not (tmp_path / "run" / "denoiser").exists()
    assert run(config).returncode == 0
    assert (newest(tmp_path / "run") / "tensors.safetensors").read_bytes() == (
        newest(finished) / "tensors.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_micro_batches_without_labels_are_one_batch(home: Path, tmp_path: Path) -> None:
    """Two micro-batches of two are one batch of four, to rounding: order, noise, times and crops go by position."""
    weights = []
    for name, batch, micro in (("one", 4, 1), ("two", 2, 2)):
        (tmp_path / name).mkdir()
        config = write_config(
            tmp_path / name, home / "plain", train_batch_size=batch, gradient_accumulation_steps=micro, crop=6,
            denoiser={"kind": "unet", "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
                      "attention_levels": [], "attention_head_dim": 8}, sample_images=1,
        )  # fmt: skip
        done = run(config)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(newest(tmp_path / name / "run") / "tensors.safetensors"))
    for name, value in weights[0].items():
        if name.startswith(("denoiser", "ema")):
            assert (value - weights[1][name]).norm() / value.norm().clamp_min(1e-6) < 1e-4, name
    found = json.loads((tmp_path / "one" / "run" / "denoiser" / "flow.json").read_text())
    assert found["shape"] == [4, 6, 6] and found["classes"] == []


@pytest.mark.slow
def test_two_processes_train_the_same_network_as_one(finished: Path, home: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, home / "latents", train_batch_size=2)
    for done in [rank.wait() for rank in ranks(program.main, [str(config)], 2)]:
        assert done.returncode == 0, done.stderr
    ours, theirs = metrics(finished), metrics(tmp_path / "run")
    assert (ours[0].pop("num_processes"), theirs[0].pop("num_processes")) == (1, 2)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    weights = [load_file(newest(folder) / "tensors.safetensors") for folder in (finished, tmp_path / "run")]
    for name, value in weights[0].items():
        if name.startswith(("denoiser", "ema")) and not name.endswith("to_k.bias"):  # whose gradient is rounding
            assert (value - weights[1][name]).norm() / value.norm().clamp_min(1e-6) < 1e-4, name


def test_dry_run_counts_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    done = run(write_config(tmp_path, home / "latents"), "--dry_run", "--denoiser.num_layers", "2")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["denoiser"]["num_layers"] == 2
    assert "11 of 4 x 8 x 8, 2 classes of `label`" in done.stdout and "GFLOP a training step" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": "no/store"}, "no/store"),
        ({"label_column": "breed"}, "label_column: the store has no breed; it has"),
        ({"crop": 9}, "crop: expected at most 8, the side of the latents, got 9"),
        ({"vae": "no/vae"}, "no/vae"),
        ({"view": "flip"}, "view: the store has no 'flip'"),
        ({"denoiser": {"kind": "gan"}}, "unknown kind `gan`; ldm_vae.denoisers has dit, unet"),
        ({"denoiser": {"kind": "dit", "patch_size": 3}}, "denoiser.patch_size"),
    ],
)
def test_a_wrong_call_is_one_sentence(home: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    done = run(write_config(tmp_path, home / "latents", **changes))
    assert says in one_sentence(done, 2)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_another_vae_than_the_stores_is_refused_and_another_config_too(
    finished: Path, home: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    other.save_pretrained(tmp_path / "other")
    config = write_config(tmp_path, home / "latents", vae=str(tmp_path / "other"))
    assert "its encoder is not the one that made" in one_sentence(run(config), 2)
    said = one_sentence(run(finished.parent / "config.yaml", "--learning_rate", "1e-3"), 2)
    assert "holds a run of another config: learning_rate (was 0.0001, now 0.001)" in said


def test_nan_stops_the_run_and_names_the_interval(home: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, home / "latents", learning_rate=1e15, checkpoint_every_images=8)
    assert "became NaN or infinite between" in one_sentence(run(config), 1)
