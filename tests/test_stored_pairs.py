"""Decoder-only training from a latent store: the decoder that training with the frozen encoder in memory gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_call import run_cli
from diffusers import AutoencoderKL
from fork_server import Finished, fork
from images import write_images
from PIL import Image
from repository import ROOT
from tiny_networks import SHAPE
from training_runs import OF_CLIPS, write_videos

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.config import load
from ldm_vae.training.config import Training
from ldm_vae.training.decoder_only import drop_encoder
from ldm_vae.training.dry_run import plan
from train import autoencoder as training_program


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 6)


def settings_of(folder: Path, base: Path, images: Path, **changes: object) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "init_from": str(base),
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_images": 8,
        "learning_rate": 1e-4,
        "log_every_images": 2,
        "dataloader_num_workers": 0,
        "model": SHAPE,
        "losses": {"l1": {"weight": 1.0}},
        "data": {"kind": "folder", "path": str(images)},
    }
    return settings | changes


def train(folder: Path, base: Path, images: Path, **changes: object) -> Finished:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_of(folder, base, images, **changes)))
    return fork(training_program.main, [str(folder / "config.yaml")]).wait()


def encode(base: Path, images: Path, store: Path, *options: str) -> Path:
    call = ("encode", base, images, store, "--resolution", 32, "--batch_size", 2, "--num_workers", 0, *options)
    assert run_cli(*call) == 0
    return store


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_autoencoder(folder / "run").state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_it_is_training_with_a_frozen_encoder(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, images: Path, tmp_path: Path
) -> None:
    for path in images.iterdir():  # of the size of a crop: training cuts and then resizes, encoding the other way round
        with Image.open(path) as image:
            image.resize((32, 32)).save(path)
    store = encode(tiny_vae_folder, images, tmp_path / "store", "--dtype", "fp32")
    done = train(tmp_path / "stored", tiny_vae_folder, images, latent_store=str(store))
    assert done.returncode == 0, done.stderr
    frozen = {"trainable": ["decoder.*", "post_quant_conv.*"], "transform": {"crop": "centre", "flip": False}}
    done = train(tmp_path / "frozen", tiny_vae_folder, images, **frozen)
    assert done.returncode == 0, done.stderr
    before, stored, expected = tiny_vae.state_dict(), weights(tmp_path / "stored"), weights(tmp_path / "frozen")
    for name, value in expected.items():
        if not name.endswith("to_k.bias"):  # its gradient is zero but for rounding, which Adam makes steps of
            torch.testing.assert_close(stored[name], value, atol=2e-6, rtol=0)
        moved = not torch.equal(value, before[name])
        assert moved == name.startswith(("decoder.", "post_quant_conv.")), name
    # its scaling is that of the whole store
    config = json.loads((tmp_path / "stored" / "run" / "vae" / "config.json").read_text())
    measured = json.loads((store / "manifest.json").read_text())["statistics"]
    variance = torch.tensor(measured["variance"]).mean() + torch.tensor(measured["mean"]).var(unbiased=False)
    assert config["scaling_factor"] == pytest.approx(float(variance) ** -0.5)
    # its checkpoints held no encoder, and are whole again with that of init_from
    assert run_cli("export", tmp_path / "stored" / "run", tmp_path / "last", "--checkpoint", "last") == 0
    assert same(dict(load_autoencoder(tmp_path / "last").state_dict()), stored)
    assert json.loads((tmp_path / "last" / "config.json").read_text())["scaling_factor"] == config["scaling_factor"]


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, 5])
def test_pixels_read_again_are_those_that_were_stored(
    frames: int | None, tiny_vae_folder: Path, images: Path, tmp_path: Path
) -> None:
    options, settings = ("--views", "ten_crop"), {}
    if frames is not None:  # two clips of each video
        images = write_videos(tmp_path / "videos", 4, 2 * frames + 2)
        options = (*options, "--frames", str(frames))
        settings = {"data": {"kind": "folder", "path": str(images), "frames": frames}} | OF_CLIPS
    plain = encode(tiny_vae_folder, images, tmp_path / "plain", *options)
    whole = encode(tiny_vae_folder, images, tmp_path / "whole", *options, "--pixels")
    for name, store, workers in (("plain", plain, 0), ("whole", whole, 0), ("workers", plain, 2)):
        folder, more = tmp_path / f"by_{name}", {"latent_store": str(store), "dataloader_num_workers": workers}
        done = train(folder, tiny_vae_folder, images, **settings | more)
        assert done.returncode == 0, done.stderr
        assert not (folder / "run" / "quarantine.jsonl").exists()
    assert same(weights(tmp_path / "by_plain"), weights(tmp_path / "by_whole"))
    assert same(weights(tmp_path / "by_plain"), weights(tmp_path / "by_workers"))
    assert not same(weights(tmp_path / "by_plain"), dict(load_autoencoder(tiny_vae_folder).state_dict()))
    if frames is not None:
        settings["data"] = {"kind": "folder", "path": str(images), "frames": 3}
        done = train(tmp_path / "others", tiny_vae_folder, images, latent_store=str(whole), **settings)
        assert done.returncode == 2 and "data.frames: expected 5, as the images are decoded, got 3" in done.stderr


def test_images_found_elsewhere_changed_or_gone(tiny_vae_folder: Path, images: Path, tmp_path: Path) -> None:
    store = encode(tiny_vae_folder, images, tmp_path / "store")
    names = sorted(path.name for path in images.iterdir())
    (images / names[1]).unlink()  # every later one moves up
    shutil.copy(images / names[2], images / names[3])
    done = train(tmp_path / "stored", tiny_vae_folder, images, latent_store=str(store))
    assert done.returncode == 0, done.stderr
    bad = [json.loads(line) for line in (tmp_path / "stored" / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((entry["key"], entry["reason"].split(";")[0]) for entry in bad) == [
        (names[1], "the image is not in the data any more"),
        (names[3], "the image has changed since it was encoded"),
    ]


@pytest.mark.slow
def test_it_resumes_and_validates(tiny_vae_folder: Path, images: Path, tmp_path: Path) -> None:
    store = encode(tiny_vae_folder, images, tmp_path / "store", "--pixels", "--views", "flip")
    more = {
        "latent_store": str(store),
        "checkpoint_every_images": 4,
        "validate_every_images": 4,
        "validation_data": {"kind": "folder", "path": str(images)},
        "validation_metrics": ["psnr"],
        "best_metric": "psnr",
    }
    assert train(tmp_path / "whole", tiny_vae_folder, images, **more).returncode == 0
    assert train(tmp_path / "parts", tiny_vae_folder, images, **more | {"max_train_images": 4}).returncode == 0
    done = train(tmp_path / "parts", tiny_vae_folder, images, **more)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "validation/psnr" in line]) == 2
    saved = next((tmp_path / "whole" / "run" / "checkpoints").glob("images-*/tensors.safetensors"))
    assert b"encoder.conv_in" not in saved.read_bytes()[:100_000]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network, images and their store, which nothing changes."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    AutoencoderConfig(**SHAPE).build().save_pretrained(folder / "vae")
    images = write_images(folder / "images", 6)
    return folder / "vae", images, encode(folder / "vae", images, folder / "store")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"init_from": None}, "latent_store: needs init_from"),
        ({"buckets": {"step": 8}}, "latent_store: its crops are what was encoded"),
        ({"resolution": 16}, "resolution: the store has no 16"),
        ({"init_from": "OTHER"}, "was made by another encoder"),
        ({"data": {"kind": "folder", "path": "IMAGES", "background": [0, 0, 0]}}, "is prepared as"),
        ({"latent_store": "nowhere"}, "no manifest.json there"),
        ({"latent_store": "MEANS"}, "expected moments, it holds mean"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    stored: tuple[Path, Path, Path], tiny_vae: AutoencoderKL, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    base, images, store = stored
    if change.get("latent_store") == "MEANS":
        change = {"latent_store": str(encode(base, images, tmp_path / "means", "--store", "mean"))}
    if change.get("init_from") == "OTHER":
        tiny_vae.encoder.conv_in.weight.data.mul_(1.5)
        tiny_vae.save_pretrained(tmp_path / "other")
        change = {"init_from": str(tmp_path / "other")}
    if "data" in change:
        change = {"data": change["data"] | {"path": str(images)}}
    done = train(tmp_path / "stored", base, images, **{"latent_store": str(store)} | change)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert not (tmp_path / "stored" / "run").exists()


@pytest.mark.slow
def test_a_dry_run_counts_no_encoder(tiny_vae_folder: Path, images: Path, tmp_path: Path) -> None:
    full = Training.model_validate(settings_of(tmp_path, tiny_vae_folder, images))
    alone = full.model_copy(update={"latent_store": "store"})
    ours, theirs = plan(alone), plan(full)
    assert "encoder" in theirs.forward_gflop and "encoder" not in ours.forward_gflop
    assert ours.step_gflop < theirs.step_gflop
    assert ours.parameters["autoencoder"] < theirs.parameters["autoencoder"]


@pytest.mark.slow
def test_what_stable_diffusions_decoder_costs_from_a_store() -> None:
    full = load(Training, ROOT / "configs" / "finetune_decoder_sd.yaml", [])
    full = full.model_copy(update={"init_from": None, "train_batch_size": 1, "trainable": ("*",)})
    ratio = plan(full).step_gflop / plan(full.model_copy(update={"latent_store": "store"})).step_gflop
    assert ratio == pytest.approx(1.40, abs=0.01)  # losses and discriminator included


def test_without_an_encoder_nothing_of_it_is_held(tiny_vae: AutoencoderKL) -> None:
    print_before = encoder_fingerprint(tiny_vae)
    drop_encoder(tiny_vae)
    assert {name.split(".")[0] for name in tiny_vae.state_dict()} == {"decoder", "post_quant_conv"}
    assert encoder_fingerprint(tiny_vae) != print_before
