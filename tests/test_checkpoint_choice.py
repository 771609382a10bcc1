"""`--checkpoint best|last|N`: the averaged weights of a checkpoint, of a run that ended and of one that was killed, in
every verb that takes a network; with the scaling that the end of the run would measure."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from cli_call import call, program, run_cli
from diffusers import AutoencoderKL
from images import write_images
from kills import fork_until
from safetensors.torch import load_file
from sentences import refused
from training_runs import metrics, run, write_config

from eval import reconstruction as evaluation_program
from ldm_vae import LatentDataset, load_autoencoder, read_manifest
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.preparation import recorded
from ldm_vae.autoencoder.weights.checkpoint import describe
from ldm_vae.core.errors import UsageError
from ldm_vae.metrics.result import labels
from ldm_vae.run.selection import at_checkpoint
from train import autoencoder as training_program

FINISHED = {"best": 16, "last": 64, "48": 48}
KILLED = {"best": 16, "last": 48, "32": 32}
CASES = [("finished", "best"), ("killed", "last"), ("killed", "32")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that gets worse: `killed` at its third checkpoint, and `finished` after that. Its learning rate is so high
    that the first of four validations is the best by 2.5 dB, on any machine."""
    folder = tmp_path_factory.mktemp("home")
    images = write_images(folder / "images", 6)
    config = write_config(
        folder, images, output_dir=str(folder / "finished"), max_train_images=64, checkpoints_total_limit=2,
        adversary={"weight": 0.0}, discriminator=None, learning_rate=1.0, lr_warmup_images=64, max_grad_norm=1.0,
        ema_halflife_images=2, validate_every_images=16, validation_images=6, validation_metrics=["psnr"],
        best_metric="psnr", validation_data={"kind": "folder", "path": str(images)}, normalisation="shift",
    )  # fmt: skip
    victim = fork_until(folder / "finished/checkpoints/images-000000048", training_program.main, [str(config)])
    victim.kill(signal.SIGKILL)
    victim.wait()
    shutil.copytree(folder / "finished", folder / "killed")
    done = run(config)
    assert done.returncode == 0, done.stderr
    return folder


def expected(home: Path, name: str, which: str) -> Path:
    return home / name / "checkpoints" / f"images-{(FINISHED if name == 'finished' else KILLED)[which]:09d}"


def averages(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "tensors.safetensors")
    return {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_went_on_after_its_vae_was_written_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(home / "finished", tmp_path / "mine", copy_function=shutil.copy2)
    load_autoencoder(folder)
    assert "older" not in capsys.readouterr().err
    os.utime(folder / "checkpoints" / "images-000000064" / "config.json")
    load_autoencoder(folder)
    assert "vae/ is older than its checkpoint images-000000064" in capsys.readouterr().err


# --- the four verbs ---------------------------------------------------------------------------------------------------


def test_a_choice_is_a_checkpoint_of_the_run(home: Path) -> None:
    for name, kept in (("finished", FINISHED), ("killed", KILLED)):
        for which in kept:
            assert at_checkpoint(str(home / name), which) == str(expected(home, name, which))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "which"), CASES)
def test_every_verb_takes_it(name: str, which: str, home: Path, tmp_path: Path) -> None:
    checkpoint, images, choice = expected(home, name, which), home / "images", ("--checkpoint", which)
    out = tmp_path / "out"
    call("export", home / name, out, *choice)
    exported = load_autoencoder(out)
    assert same(exported.state_dict(), averages(checkpoint))
    assert recorded(exported) == recorded(load_autoencoder(home / "finished"))
    assert f"{int(checkpoint.name[7:])} images seen" in (out / "README.md").read_text()
    # what validation measured of these averages
    measured = tmp_path / "measured"
    program(
        evaluation_program, home / name, images, "--output", measured, "--resolution", 32, "--metrics", "psnr",
        "--num_workers", 0, "--batch_size", 2, *choice,
    )  # fmt: skip
    result = json.loads((measured / "metrics.json").read_text())
    (score,) = [
        line["validation/psnr"] for line in metrics(home / "finished")
        if "validation/psnr" in line and line["images"] == int(checkpoint.name[7:])
    ]  # fmt: skip
    assert result["vae"]["source"] == str(checkpoint) and checkpoint.name in result["vae"]["name"]
    assert result["vae"]["scaling_factor"] is None
    assert result["metrics"]["psnr"]["mean"] == pytest.approx(score, abs=1e-4)
    # a store reads like one of the export: the same encoder, the same measured normalisation
    call("encode", home / name, images, tmp_path / "store", "--resolution", 32, "--num_workers", 0, *choice)
    manifest = read_manifest(tmp_path / "store")
    assert manifest.recorded.vae == str(checkpoint)
    assert manifest.identity.encoder == encoder_fingerprint(exported)
    assert manifest.normalisation == Normalisation.from_config(exported.config)
    assert manifest.normalisation.kind == "shift" and manifest.normalisation.scaling_factor != 1.0
    call("decode", tmp_path / "store", tmp_path / "decoded", "--count", 1)  # its own VAE, by the name it recorded
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 1
    for source, more in ((home / name, choice), (out, ())):
        call("reconstruct", source, images / "img_0000.png", tmp_path / f"seen{len(more)}", *more)
    assert (tmp_path / "seen2/img_0000.png").read_bytes() == (tmp_path / "seen0/img_0000.png").read_bytes()


@pytest.mark.slow
def test_the_last_of_a_finished_run_is_its_vae(home: Path, tmp_path: Path) -> None:
    """The same weights, normalisation and statistics, to the bit."""
    call("export", home / "finished", tmp_path / "last", "--checkpoint", "last")
    call("export", home / "finished", tmp_path / "vae")
    for file in ("config.json", "diffusion_pytorch_model.safetensors", "latent_statistics.json", "preprocessing.json"):
        assert (tmp_path / "last" / file).read_bytes() == (tmp_path / "vae" / file).read_bytes(), file


@pytest.mark.slow
def test_a_store_of_a_checkpoint_is_not_taken_for_one_of_the_finished_run(home: Path, tmp_path: Path) -> None:
    encode = ("encode", home / "finished", home / "images", tmp_path / "store", "--resolution", 32, "--num_workers", 0)
    call(*encode, "--checkpoint", "best")
    before = LatentDataset(tmp_path / "store")[0]["latents"]
    with refused(UsageError, "encoder"):
        call(*encode)
    with refused(UsageError, "encoder"):
        call(*encode, "--checkpoint", "last")
    call(*encode, "--checkpoint", "16")  # the best, by its other name
    assert torch.equal(LatentDataset(tmp_path / "store")[0]["latents"], before)


def test_two_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = [tmp_path / name / "checkpoints/images-000000016" for name in ("one", "other")]
    for checkpoint in names:
        checkpoint.mkdir(parents=True)
        (checkpoint / "tensors.safetensors").touch()
    assert labels([str(name) for name in names]) == ["one-images-000000016", "other-images-000000016"]


def test_a_checkpoint_tells_the_side_of_its_images(tiny_vae: AutoencoderKL) -> None:
    assert json.loads(describe(tiny_vae, 24)["config.json"])["sample_size"] == 24  # diffusers cuts its tiles by it


# --- the scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_runs_images_the_scaling_is_measured_on_others_or_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "killed", tmp_path / "run")
    for config in (tmp_path / "run").rglob("config.yaml"):
        config.write_text(config.read_text().replace(str(home / "images"), str(tmp_path / "gone")))
    checkpoint = tmp_path / "run/checkpoints/images-000000032"
    for call_ in (
        ("export", checkpoint, tmp_path / "out"),
        ("encode", checkpoint, home / "images", tmp_path / "out", "--resolution", 32, "--num_workers", 0),
        ("fp16", "fix", checkpoint, tmp_path / "out"),
    ):
        with refused(UsageError, "VAE"):
            call(*call_)
        assert not (tmp_path / "out").exists()
    call("export", checkpoint, tmp_path / "out", "--stats", home / "images", "--resolution", 32)
    own = Normalisation.from_config(load_autoencoder(tmp_path / "out").config)
    assert own.kind == "shift" and own.scaling_factor != 1.0  # of the run's kind
    with refused(UsageError, "normalisation_from"):  # nothing divides by what was never measured
        call("export", home / "finished", tmp_path / "other", "--normalisation_from", checkpoint)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_that_is_not_there_is_refused_with_those_that_are(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "killed", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for which in ("40", "first", "-1"):
        with refused(UsageError, f"--checkpoint {which}") as error:
            at_checkpoint(str(tmp_path / "run"), which)
        assert "16, 32, 48" in str(error.value)
    with refused(UsageError, "--checkpoint last"):
        at_checkpoint(str(home / "finished" / "vae"), "last")
    with (checkpoints / "images-000000016" / "tensors.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"damaged!!")
    with refused(UsageError, "--checkpoint best"):
        at_checkpoint(str(tmp_path / "run"), "best")
    shutil.rmtree(checkpoints / "images-000000016")
    with refused(UsageError, "--checkpoint best") as error:
        at_checkpoint(str(tmp_path / "run"), "best")
    assert "images-000000016" in str(error.value) and "32, 48" in str(error.value)


@pytest.mark.slow
def test_a_run_without_vae_names_its_checkpoints(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("tiling", home / "killed", home / "images/img_0000.png") == 2
    said = capsys.readouterr().err
    assert "images-000000048" in said and "--checkpoint" in said and "not finished" not in said
    shutil.copytree(home / "killed", tmp_path / "run")
    for described in (tmp_path / "run").glob("checkpoints/*/config.json"):
        described.unlink()
    with refused(UsageError, "VAE"):
        load_autoencoder(tmp_path / "run")
    with refused(UsageError, "VAE"):  # an older version's, or a diffusion model's
        load_autoencoder(tmp_path / "run/checkpoints/images-000000048")


@pytest.mark.slow
def test_best_needs_a_validation(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    victim = fork_until(
        tmp_path / "run/checkpoints/images-000000016", training_program.main, [str(write_config(tmp_path, images))]
    )
    victim.kill(signal.SIGKILL)
    victim.wait()
    with refused(UsageError, "--checkpoint best"):
        at_checkpoint(str(tmp_path / "run"), "best")
    assert at_checkpoint(str(tmp_path / "run"), "last").endswith("images-000000016")
    shutil.rmtree(tmp_path / "run/checkpoints/images-000000016")
    with refused(UsageError, "--checkpoint last"):
        at_checkpoint(str(tmp_path / "run"), "last")
