"""train.prior as a user runs it: both kinds, killed and resumed, on two processes, called wrongly."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from html_page import Page
from kills import fork_until, ranks
from PIL import Image
from prior_runs import MASKED, run, start, write_config, write_materials
from repository import ROOT
from safetensors.torch import load_file
from sentences import refused
from training_runs import assert_same_run, metrics, newest, one_sentence

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.latent_store import LatentDataset
from ldm_vae.metrics.psnr import psnr
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.sampling import SamplingConfig
from train import prior as program


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_materials(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("finished")
    held_out = {"validation_latents": str(home / "heldout"), "validation_images": 9}  # it has 6
    done = run(write_config(folder, home / "indices", sample_every_images=32, **held_out))
    assert done.returncode == 0, done.stderr
    assert "bits per index of 6 held-out images: prior " in done.stdout
    return folder / "run"


def test_a_run_leaves_what_other_programs_rely_on(finished: Path, home: Path) -> None:
    lines = metrics(finished)
    assert [line["images"] for line in lines] == [8, 16, 16, 24, 32, 32, 40, 48, 48]
    assert {"loss/total", "gradient_norm/prior", "learning_rate"} <= set(lines[-2])
    grids = sorted(path.name for path in (finished / "samples").iterdir())
    assert grids == ["images-000000032.png", "images-000000048.png", "independent.png", "originals.png"]
    found = json.loads((finished / "report" / "prior.json").read_text())
    assert found["grids"] == grids[:2] and found["labels"] == ["cats", "dogs"] * 2
    # what is loaded draws and measures as the run did, from the averaged weights
    vae = load_autoencoder(home / "vae")
    generator = CodeGenerator.load(finished, vae)
    ema = load_file(newest(finished) / "tensors.safetensors")
    for name, value in generator.prior.network.state_dict().items():
        assert torch.equal(value, ema[f"ema.{name}"]), name
    last = np.asarray(Image.open(finished / "samples" / grids[1]))
    top = found["gap"] + found["strip"]
    first = ((generator.pixels([0])[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(last[top : top + 16, 4:20].astype(int) - first.astype(int)).max() <= 1
    with refused(UsageError, "label"):
        generator.labels([0], "birds")
    assert generator.labels([5, 6], 1).tolist() == [1, 1] and generator.labels([5, 6]).tolist() == [1, 0]
    one = generator.indices([3], label=1, sampling=SamplingConfig(top_k=1))
    assert torch.equal(one, generator.indices([9], label=1, sampling=SamplingConfig(top_k=1))), "the mode is one"


def test_the_rates_are_those_of_the_held_out_codes(finished: Path, home: Path) -> None:
    rates = json.loads((finished / "report" / "prior.json").read_text())["rates"]
    vae = load_autoencoder(home / "vae")
    generator = CodeGenerator.load(finished, vae)
    data = LatentDataset(home / "heldout", pixels=True)
    batch = data.read(range(6), [0] * 6, ("label",))
    assert sorted(batch["label"]) == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        nats = generator.prior.nats(batch["indices"][:, None], torch.tensor(batch["label"]), 0, range(6))
    bits = rates["bits_per_index"]
    assert bits["prior"]["mean"] == pytest.approx(float(nats.mean()) / math.log(2) / 64, rel=1e-6)
    assert metrics(finished)[-1]["validation/bits_per_index"] == pytest.approx(bits["prior"]["mean"], rel=1e-6)
    assert metrics(finished)[-1]["validation/bits_per_pixel"] == pytest.approx(bits["prior"]["mean"] / 4, rel=1e-6)
    assert rates["is_exact"] and rates["held_out"] and rates["uniform"] == 4
    assert rates["fitted"] == pytest.approx(data.manifest.statistics["entropy_bits"], abs=1e-9)
    assert (rates["indices"], rates["pixels"], rates["images"]) == (64, 256, 6)
    decoded = data.decode(batch["indices"], vae)
    rounded = (decoded * 127.5 + 127.5).round().clamp(0, 255)
    assert rates["psnr"]["mean"] == pytest.approx(float(psnr(batch["pixels"], rounded).mean()), abs=1e-3)
    page = Page((finished / "report" / "index.html").read_text())
    assert page.sections[0] == "prior" and "Prior report" in page.text
    for words in (f"{bits['prior']['mean']:.3f}", f"{bits['overall']['mean']:.3f}", f"{rates['psnr']['mean']:.2f} dB",
                  f"{rates['fitted']:.3f}", "its exact likelihood", "independent, by position", "independent, fitted",
                  "ldm-vae prior"):  # fmt: skip
        assert words in page.text, words
    assert {"cats, samples", "independent codes, decoded"} <= {image["alt"] for image in page.all("img")}


def test_the_pages_snippet_samples_from_a_run(finished: Path, home: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "discrete.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"run": finished, "vae": home / "vae"}
    exec(compile(snippet, "docs/discrete.md", "exec"), names)
    assert names["pixels"].shape == (8, 3, 16, 16) and names["indices"].shape == (8, 1, 8, 8)
    assert torch.equal(names["generator"].pixels(range(8)), names["pixels"])


def test_a_masked_prior_measures_a_bound_and_says_so(home: Path, tmp_path: Path) -> None:
    changes = {"model": MASKED, "sampling": {"steps": 3}, "max_train_images": 16, "conditional": False}
    done = run(write_config(tmp_path, home / "indices", **changes))
    assert done.returncode == 0, done.stderr
    assert "images of the training store: prior at most " in done.stdout
    assert "the distortion is not measured" in done.stdout
    assert "validation/bound_bits_per_index" in metrics(tmp_path / "run")[-1]
    page = Page((tmp_path / "run" / "report" / "index.html").read_text())
    assert "an upper bound, of indices unmasked in a random order" in page.text
    generator = CodeGenerator.load(tmp_path / "run", load_autoencoder(home / "vae"))
    assert generator.indices(range(3)).shape == (3, 1, 8, 8) and generator.classes == ()
    assert (tmp_path / "run" / "prior" / "scheduler_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, MASKED], ids=["transformer", "masked"])
def test_killed_and_resumed_is_bit_equal(finished: Path, home: Path, tmp_path: Path, model: Any) -> None:
    changes = {"validation_latents": str(home / "heldout"), "validation_images": 9, "sample_every_images": 32}
    changes |= {} if model is None else {"model": model}
    whole = finished
    if model is not None:
        (tmp_path / "whole").mkdir()
        assert run(write_config(tmp_path / "whole", home / "indices", **changes)).returncode == 0
        whole = tmp_path / "whole" / "run"
    config = write_config(tmp_path, home / "indices", **changes)
    victim = fork_until(tmp_path / "run/checkpoints/images-000000016", program.main, [str(config)])
    victim.kill(signal.SIGKILL)
    assert victim.wait().returncode == -signal.SIGKILL
    done = run(config, "--dataloader_num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_two_processes_and_micro_batches_train_the_same_network_as_one(home: Path, tmp_path: Path) -> None:
    for model in ({}, {"model": MASKED}):
        weights, logs = [], []
        for name, changes in (("one", {}), ("two", {"train_batch_size": 2}),
                              ("micro", {"train_batch_size": 2, "gradient_accumulation_steps": 2})):  # fmt: skip
            folder = tmp_path / f"{name}{len(model)}"
            folder.mkdir()
            config = write_config(folder, home / "indices", crop=6, optimizer={"eps": 1e-4}, **changes, **model)
            launched = ranks(program.main, [str(config)], 2) if name == "two" else [start(config)]
            done = [one.wait() for one in launched]
            assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
            weights.append(load_file(newest(folder / "run") / "tensors.safetensors"))
            logs.append(metrics(folder / "run"))
        for other, log in zip(weights[1:], logs[1:], strict=True):
            for mine, theirs in zip(logs[0], log, strict=True):
                assert {**mine, "num_processes": 1} == pytest.approx({**theirs, "num_processes": 1}, rel=1e-4)
            for name, value in weights[0].items():
                if name.startswith(("prior", "ema")) and value.is_floating_point():
                    assert (value - other[name]).norm() / value.norm().clamp_min(1e-2) < 1e-4, name


def test_dry_run_counts_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    done = run(write_config(tmp_path, home / "indices"), "--dry_run", "--model.num_layers", "2")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["num_layers"] == 2
    assert "11 of 1 x 8 x 8, 2 classes of `label`" in done.stdout and "GFLOP a training step" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("store", "changes", "says"),
    [
        ("vectors", {}, "holds mean; a prior needs indices of codes"),
        ("indices", {"validation_latents": "vectors"}, "expected codes of the VAE that made"),
        ("indices", {"validation_latents": "birds_indices"}, "its label 0 is birds, that of training is cats"),
        ("indices", {"crop": 9}, "crop: expected at most 8, the side of the latents, got 9"),
        ("indices", {"model": {"kind": "lstm"}}, "unknown kind `lstm`; ldm_vae.priors has masked, transformer"),
        ("indices", {"model": MASKED | {"num_attention_heads": 3}}, "hidden_size: expected a multiple of"),
        ("indices", {"sampling": {"top_p": 1.5}}, "sampling.top_p"),
        ("indices", {"model": {"kind": "transformer", "order": "spiral"}}, "model.order"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    home: Path, tmp_path: Path, store: str, changes: dict[str, Any], says: str
) -> None:
    if "validation_latents" in changes:
        changes = {"validation_latents": str(home / changes["validation_latents"])}
    done = run(write_config(tmp_path, home / store, **changes))
    assert says in one_sentence(done, 2)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_run_without_a_prior_and_a_broken_one_are_one_sentence(finished: Path, home: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(home / "vae")
    with refused(UsageError, "which train.prior writes at its end"):
        CodeGenerator.load(tmp_path, vae)
    (tmp_path / "prior").mkdir()
    call = json.loads((finished / "prior" / "prior.json").read_text())
    (tmp_path / "prior" / "prior.json").write_text(json.dumps(call | {"codes": "many"}))
    with refused(UsageError, "codes"):
        CodeGenerator.load(tmp_path, vae)
    (tmp_path / "prior" / "prior.json").write_text(json.dumps(call | {"codes": 17}))
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").symlink_to(
        finished / "prior" / "diffusion_pytorch_model.safetensors"
    )
    with refused(UsageError, "head.bias"):
        CodeGenerator.load(tmp_path, vae)
