"""Programs and verbs on images with alpha: training on generated cut-outs, and what is written of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_call import call, program
from cut_outs import write_cut_outs
from PIL import Image
from sentences import refused
from tiny_classes import tiny
from tiny_networks import SHAPE
from training_runs import TINY, metrics, newest, run, run_two, write_config

from eval import diffusability, latent_space, reconstruction
from ldm_vae import cli
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import record
from ldm_vae.core.config import load
from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.data.source import open_source
from ldm_vae.data.survey import survey, thumbnails
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.latent_store import LatentDataset
from ldm_vae.latent_store.format.manifest import read_manifest
from ldm_vae.latent_store.read.pictures import contact_sheet
from ldm_vae.training.config import Training
from ldm_vae.training.dry_run import plan

SIDE = 32


def alpha_config(folder: Path, images: Path, **changes: Any) -> Path:
    data = {"kind": "folder", "path": str(images), "channels": 4, "alpha": True}
    losses = {"l1": {"weight": 1.0}, "alpha": {"weight": 1.0}, "kl": {"weight": 1e-6}}
    model = TINY["model"] | {"in_channels": 4}  # type: ignore[operator]
    return write_config(folder, images, **{"data": data, "losses": losses, "model": model} | changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_outs(tmp_path_factory.mktemp("data") / "images", 11, 40)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights whose record says that its images have alpha."""
    torch.manual_seed(0)
    found = AutoencoderConfig(**SHAPE | {"in_channels": 4}).build().eval()
    folder = tmp_path_factory.mktemp("vae") / "vae"
    write_vae(record(found, Preprocessing.of(Decoding(4, alpha=True))), folder, None, sample_size=SIDE)
    return folder


def modes(folder: Path) -> list[str]:
    """Of the PNG files of a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            found.append(picture.mode)
    return found


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumes_bit_equal_and_two_processes_train_the_same(images: Path, tmp_path: Path) -> None:
    """The backgrounds are keyed: with the adversary, which sees composites, and micro-batches."""
    folders = {name: tmp_path / name for name in ("whole", "halves", "two")}
    whole = {"max_train_images": 24, "train_batch_size": 4, "log_every_images": 4, "checkpoint_every_images": 12,
             "adversary": {"weight": 0.5, "start_images": 8, "warmup_images": 4}}  # fmt: skip
    for folder in folders.values():
        folder.mkdir()
    config = alpha_config(folders["whole"], images, **whole)
    assert run(config).returncode == 0
    halves = alpha_config(folders["halves"], images, **whole | {"max_train_images": 12})
    assert run(halves).returncode == 0
    done = run(halves, "--max_train_images", "24", "--dataloader_num_workers", "1")
    assert done.returncode == 0 and "resumed from" in done.stdout
    assert (newest(folders["halves"] / "run") / "tensors.safetensors").read_bytes() == (
        newest(folders["whole"] / "run") / "tensors.safetensors"
    ).read_bytes()
    run_two(alpha_config(folders["two"], images, **whole | {"train_batch_size": 2}))
    ours, theirs = (metrics(folders[name] / "run") for name in ("whole", "two"))
    assert "loss/alpha" in ours[-1] and "adversary/weight" in ours[-1]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.pop("warnings", None) == other.pop("warnings", None)
        assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_a_short_training_reduces_the_errors_of_alpha_and_of_composites(tmp_path: Path) -> None:
    images = write_cut_outs(tmp_path / "images", 24, SIDE)
    data = {"kind": "folder", "path": str(images), "channels": 4, "alpha": True}
    shape = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "in_channels": 4}
    losses = {"l1": {}, "alpha": {}, "lpips": {"net": "alex", "weight": 0.5}, "kl": {"weight": 1e-6}}
    config = alpha_config(
        tmp_path, images, losses=losses, model=shape, adversary={"weight": 0.0}, discriminator=None, resolution=SIDE,
        train_batch_size=8, max_train_images=560, learning_rate=4e-3, validation_data=data, validation_images=8,
        validate_every_images=80, log_every_images=80, checkpoint_every_images=560, ema_halflife_images=20,
        validation_metrics=["psnr", "lpips_alex", "alpha_l1", "alpha_psnr"], best_metric="alpha_psnr",
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr
    found = [line for line in metrics(tmp_path / "run") if "validation/alpha_l1" in line]
    first, last = found[0], found[-1]
    assert last["validation/alpha_l1"] < 0.5 * first["validation/alpha_l1"]
    assert last["validation/lpips_alex"] < 0.7 * first["validation/lpips_alex"]
    assert last["validation/psnr"] > first["validation/psnr"] + 2 and "linear_code/psnr" in last
    assert set(modes(tmp_path / "run/report/validation")) == {"RGB"}
    assert json.loads((tmp_path / "run/vae/preprocessing.json").read_text())["alpha"] == "straight"
    assert "straight alpha" in (tmp_path / "run/vae/README.md").read_text()


def test_the_plan_counts_three_channels_for_what_sees_composites(images: Path, tmp_path: Path) -> None:
    found = plan(load(Training, alpha_config(tmp_path, images)))
    config = alpha_config(tmp_path, images)
    as_they_are = yaml.safe_load(config.read_text())
    as_they_are["data"]["alpha"] = False
    del as_they_are["losses"]["alpha"]
    config.write_text(yaml.safe_dump(as_they_are))
    other = plan(load(Training, config))
    assert 0 < found.parameters["discriminator"] < other.parameters["discriminator"]
    assert found.forward_gflop["encoder"] == other.forward_gflop["encoder"]


def test_configs_that_do_not_hold_together_are_refused(images: Path, vae: Path, tmp_path: Path) -> None:
    plain = {"kind": "folder", "path": str(images), "channels": 4}
    with refused(UsageError, "validation_metrics"):
        load(Training, alpha_config(tmp_path, images, data=plain, losses={"l1": {}},
                                    validation_metrics=["alpha_l1"], best_metric="alpha_l1"))  # fmt: skip
    with refused(UsageError, "validation_data"):
        load(Training, alpha_config(tmp_path, images, validation_data=plain))
    for changes, field in (
        ({"data": plain, "losses": {"l1": {}}, "init_from": str(vae)}, "data.alpha"),
        ({"data": plain | {"channels": 3, "alpha": True}, "model": SHAPE}, "alpha"),
    ):
        done = run(alpha_config(tmp_path, images, **changes))
        assert done.returncode == 2 and field in done.stderr.splitlines()[-1], done.stderr


def test_a_decoder_trains_on_a_store_of_images_with_alpha(images: Path, vae: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    call("encode", vae, images, store, "--resolution", SIDE, "--num_workers", 0, "--pixels")
    assert read_manifest(store).identity.preprocessing == "1 channels=4 alpha=True"
    changes = {
        "latent_store": str(store), "init_from": str(vae), "resolution": SIDE, "max_train_images": 4,
        "trainable": ["decoder.*", "post_quant_conv.*"],
    }  # fmt: skip
    done = run(alpha_config(tmp_path, images, **changes))
    assert done.returncode == 0, done.stderr
    assert "loss/alpha" in metrics(tmp_path / "run")[-1]
    shutil.rmtree(tmp_path / "run")
    plain = {"kind": "folder", "path": str(images), "channels": 4}
    other = {"data": plain, "losses": {"l1": {}}, "ignore_preprocessing": True}
    done = run(alpha_config(tmp_path, images, **changes | other))
    assert done.returncode == 2 and "data.alpha: expected true" in done.stderr


def test_qwen_image_2_1_trains_on_images_with_alpha_alone(images: Path, tmp_path: Path) -> None:
    """Its class says that its four channels are RGBA; it has no record before."""
    tiny("AutoencoderKLQwenImage21").save_pretrained(tmp_path / "base")
    changes = {
        "model": {"kind": "pretrained", "in_channels": 4}, "init_from": str(tmp_path / "base"), "resolution": 32,
        "max_train_images": 4, "adversary": {"weight": 0.5, "start_images": 0},
    }  # fmt: skip
    done = run(alpha_config(tmp_path, images, **changes))
    assert done.returncode == 0, done.stderr
    last = metrics(tmp_path / "run")[-1]
    assert last["loss/alpha"] > 0 and last["adversary/weight"] > 0
    assert json.loads((tmp_path / "run/vae/preprocessing.json").read_text())["alpha"] == "straight"
    shutil.rmtree(tmp_path / "run")
    plain = {"data": {"kind": "folder", "path": str(images), "channels": 4}, "losses": {"l1": {}}}
    done = run(alpha_config(tmp_path, images, **changes | plain))
    assert done.returncode == 2 and "data.alpha" in done.stderr.splitlines()[-1], done.stderr


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_reconstruct_and_decode_write_alpha(images: Path, vae: Path, tmp_path: Path) -> None:
    first = sorted(images.iterdir())[0]
    cli.call("reconstruct", str(vae), str(first), str(tmp_path / "out"))
    with Image.open(tmp_path / "out" / first.name) as picture:
        assert picture.mode == "RGBA" and picture.size == (40, 40)
        assert len(np.unique(np.asarray(picture)[:, :, 3])) > 2
    with Image.open(tmp_path / "out" / f"{first.stem}.before-after.png") as both:
        assert both.mode == "RGB" and both.size == (80, 40)
        board = np.asarray(both)[:, :40]
    with Image.open(first) as picture:
        assert set(np.unique(board[np.asarray(picture)[:, :, 3] == 0])) == {204, 255}
    call("encode", vae, images, tmp_path / "store", "--resolution", SIDE, "--num_workers", 0)
    call("decode", tmp_path / "store", tmp_path / "decoded", "--count", 2)
    assert modes(tmp_path / "decoded") == ["RGBA", "RGBA"]
    dataset = LatentDataset(tmp_path / "store", sample=False, columns=("key",))
    with Image.open(io.BytesIO(contact_sheet(dataset, load_autoencoder(vae), side=SIDE))) as sheet:
        assert sheet.mode == "RGB" and np.asarray(sheet).std() > 0
    source = open_source(images, channels=4, alpha=True)
    thumbnails(source, survey(source), tmp_path / "thumbnails.png")
    with Image.open(tmp_path / "thumbnails.png") as picture:
        shown = np.asarray(picture)
    assert picture.mode == "RGB" and {204, 255} <= set(np.unique(shown))


@pytest.mark.usefixtures("few_features")
def test_evaluate_and_latent_space_measure_composites(images: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program(reconstruction, vae, images, "--output", out, "--resolution", SIDE, "--num_workers", 0, "--pictures", 2,
            "--metrics", "psnr,lpips_alex,delta_e,fd_efflite0,alpha_psnr,alpha_l1")  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    assert all(found["metrics"][name]["mean"] is not None for name in ("psnr", "lpips_alex", "delta_e", "alpha_l1"))
    assert found["data"]["preprocessing"] == "1 channels=4 alpha=True"
    assert any("composites" in note for note in found["data"]["notes"])
    for folder in ("pictures", "samples"):
        assert "RGB" in modes(out / folder) and "RGBA" not in modes(out / folder)
    cli.call("report", str(out))
    assert "Alpha PSNR" in (out / "index.html").read_text()
    # the same images by flag, for a network that records nothing: the same numbers
    bare = tmp_path / "bare"
    shutil.copytree(vae, bare)
    (bare / "preprocessing.json").unlink()
    again = tmp_path / "again"
    program(reconstruction, bare, images, "--output", again, "--resolution", SIDE, "--num_workers", 0, "--pictures", 0,
            "--metrics", "psnr,alpha_l1", "--alpha", "straight", "--channels", 4)  # fmt: skip
    same = json.loads((again / "metrics.json").read_text())["metrics"]
    assert all(same[name] == found["metrics"][name] for name in ("psnr", "alpha_l1"))
    program(latent_space, vae, images, "--output", tmp_path / "latents", "--resolution", SIDE, "--num_workers", 0,
            "--components", 0, "--pairs", 1)  # fmt: skip
    space = json.loads((tmp_path / "latents/latent_space.json").read_text())
    assert space["likelihood"] is None and space["metrics"]["psnr"]["mean"] == pytest.approx(
        found["metrics"]["psnr"]["mean"], abs=1e-3
    )
    assert set(modes(tmp_path / "latents/latent_space")) == {"RGB"}


@pytest.mark.usefixtures("few_features")
def test_drift_and_probe_see_composites(
    images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("drift", vae, vae, images, "--resolution", SIDE, "--images", 4, "--json")
    assert json.loads(capsys.readouterr().out)["metrics"]["base -> tuned"]["lpips_alex"]["mean"] > 0
    program(diffusability, vae, images, "--output", tmp_path / "probe", "--resolution", 16, "--seeds", 1,
            "--train_images", 32, "--batch_size", 8, "--layers", 1, "--heads", 1, "--samples", 8,
            "--steps", 2)  # fmt: skip
    found = json.loads((tmp_path / "probe/diffusability.json").read_text())
    assert found["vaes"][0]["fd_reconstructions"] > 0
    assert set(modes(tmp_path / "probe/pictures")) == {"RGB"}
    (tmp_path / "bare").mkdir()
    AutoencoderConfig(**SHAPE | {"in_channels": 4}).build().save_pretrained(tmp_path / "bare")
    with refused(UsageError, "channels"):
        program(diffusability, tmp_path / "bare", images, "--output", tmp_path / "other", "--resolution", 16)
