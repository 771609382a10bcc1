"""The decoder alone, of any class of images: stored latents teach it what they teach it with the encoder in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cli_call import run_cli
from images import write_images
from PIL import Image
from sentences import refused
from tiny_classes import TRAINED, clips_for, pixels_for, tiny
from tiny_networks import TinyLPIPS
from training_runs import metrics, newest, one_sentence, run, write_config

from ldm_vae import open_images, write_store
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.fine_tuning import encoder_parts, idle_parameters
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.geometry import geometry_of, some_latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses import lpips
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.lpips import Config as LPIPSConfig
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.models.pretrained import Config as Pretrained
from ldm_vae.run.optim import OptimizerConfig, trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.decoder_only import drop_encoder
from ldm_vae.training.dry_run import plan
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

RAE = {"latents_mean": [[[0.1]]] * 64, "latents_std": [[[1.5]]] * 64}  # [c, 1, 1]
PRETRAINED: dict[str, Any] = {
    "model": {"kind": "pretrained"}, "losses": {"l1": {}}, "transform": {"crop": "centre", "flip": False},
    "max_train_images": 32, "adversary": {"weight": 0.5, "start_images": 8},
}  # fmt: skip


def decoders_own(vae: Any, frames: int | None = None) -> Any:
    """The network in training, its decoder alone learning."""
    ahead, idle = tuple(f"{name}." for name in encoder_parts(vae)), idle_parameters(vae, frames)
    for name, parameter in vae.requires_grad_(False).named_parameters():
        parameter.requires_grad_(name not in idle and not name.startswith(ahead))
    return vae.train()


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_dropped_is_all_that_a_decode_does_without(name: str) -> None:
    vae = tiny(name)
    z = some_latents(vae, 2)
    before = latents.decode(vae, z)
    ahead = sum(parameter.numel() for part in encoder_parts(vae) for parameter in vae.get_submodule(part).parameters())
    count, print_before = sum(parameter.numel() for parameter in vae.parameters()), encoder_fingerprint(vae)
    drop_encoder(vae)
    assert torch.equal(latents.decode(vae, z), before)
    assert 0 < ahead == count - sum(parameter.numel() for parameter in vae.parameters())
    assert encoder_parts(vae) == encoder_parts(tiny(name)) and encoder_fingerprint(vae) != print_before


@pytest.mark.parametrize(("name", "clips"), [*((name, False) for name in TRAINED), ("AutoencoderKLWan", True)])
def test_an_update_from_stored_moments_is_the_update_with_the_encoder(
    name: str, clips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpips, "random_lpips", lambda net: TinyLPIPS())
    images = (clips_for if clips else pixels_for)(tiny(name))
    frames, of_clips = images.shape[2] if clips else None, {"time": TemporalDifference()} if clips else {}
    moments = latents.encode(tiny(name), images)
    results = []
    for stored in (None, moments):
        vae = decoders_own(tiny(name), frames)
        if stored is not None:
            drop_encoder(vae)
        network = TrainableAutoencoder(vae, Pretrained().bottleneck(vae))
        torch.manual_seed(3)
        channels = geometry_of(vae).in_channels
        terms = {"l1": L1()} | ({"lpips": LPIPSConfig(frames=2 if clips else None)} if channels == 3 else {}) | of_clips
        critic = PatchGAN(width=8, layers=1, dimensions=3 if clips else 2).build(channels)
        objective = Objective(terms, True)
        optimizers = [OptimizerConfig().build(trainable_parameters([one]), 1e-3) for one in (network, critic)]
        step = TrainingStep(
            Accelerator(cpu=True), network, objective, optimizers[0], Adversary(AdversaryConfig(weight=0.5)), critic,
            optimizers[1],
        )  # fmt: skip
        noise = torch.randn(2, *network.noise_shape(*images.shape[2:]), generator=torch.Generator().manual_seed(4))
        logs = [step(images, noise, 0, stored) for _ in range(2)]
        results.append((logs, dict(vae.named_parameters()), critic.state_dict()))
    (logs, expected, critics), (other_logs, found, other_critics) = results
    assert logs[0].keys() == other_logs[0].keys() and {"loss/pixels", "adversary/weight"} <= logs[0].keys()
    for one, other in zip(logs, other_logs, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert found.keys() < expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert all(torch.equal(other_critics[key], value) for key, value in critics.items())
    before = dict(tiny(name).named_parameters())
    moved = {key for key, value in expected.items() if not torch.equal(value, before[key])}
    assert moved and moved <= found.keys()


# --- AutoencoderRAE, through the programs -----------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = write_images(tmp_path / "images", 6)
    for path in folder.iterdir():  # of the size of a crop: training cuts and then resizes, encoding the other way round
        with Image.open(path) as image:
            image.resize((32, 32)).save(path)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("AutoencoderRAE", **RAE).save_pretrained(tmp_path / "rae")
    return tmp_path / "rae"


def settings_of(folder: Path, images: Path, base: Path, **changes: Any) -> Path:
    folder.mkdir()
    return write_config(folder, images, init_from=str(base), **PRETRAINED | changes)


def weights(vae: Path) -> dict[str, torch.Tensor]:
    return dict(load_autoencoder(vae).state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_from_a_store_is_the_run_from_its_images(images: Path, base: Path, tmp_path: Path) -> None:
    options = ("--resolution", 32, "--batch_size", 2, "--num_workers", 0, "--dtype", "fp32", "--pixels")
    assert run_cli("encode", base, images, tmp_path / "store", *options) == 0
    done = run(settings_of(tmp_path / "images_run", images, base))
    assert done.returncode == 0 and "the encoder is unchanged" in done.stdout, done.stderr
    # the pixels are in the store: the images are not needed any more
    stored = {"latent_store": str(tmp_path / "store")}
    done = run(settings_of(tmp_path / "stored_run", images, base, **stored))
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / name / "run" for name in ("images_run", "stored_run")]
    expected, found = (weights(one / "vae") for one in runs)
    before = weights(base)
    assert same(expected, found) and metrics(runs[0]) == metrics(runs[1])
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    assert moved and all(name.startswith("decoder.") for name in moved)
    # no checkpoint holds the encoder, and each is the whole class again with that of init_from
    assert b"autoencoder.encoder." not in (newest(runs[1]) / "tensors.safetensors").read_bytes()[:100_000]
    assert run_cli("export", runs[1], tmp_path / "last", "--checkpoint", "last") == 0
    assert same(weights(tmp_path / "last"), found)


def test_a_dry_run_holds_no_encoder(images: Path, base: Path, tmp_path: Path) -> None:
    whole = config.load(Training, settings_of(tmp_path / "run", images, base))
    ours, theirs = plan(whole.model_copy(update={"latent_store": "store"})), plan(whole)
    held = sum(parameter.numel() for parameter in load_autoencoder(base).encoder.parameters())
    assert theirs.parameters["autoencoder"] - ours.parameters["autoencoder"] == held
    assert "encoder" not in ours.forward_gflop and theirs.forward_gflop["encoder"] > 0
    assert theirs.step_gflop - ours.step_gflop == pytest.approx(theirs.forward_gflop["encoder"])


def test_a_frozen_encoder_draws_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = tiny("AutoencoderRAE", noise_tau=0.8)
    noisy.save_pretrained(tmp_path / "rae")
    vae = build_autoencoder(config.load(Training, settings_of(tmp_path / "run", images, tmp_path / "rae")))
    assert "noise_tau 0.8 is left out" in capsys.readouterr().err
    network = TrainableAutoencoder(vae, Pretrained().bottleneck(vae)).train()
    pixels = pixels_for(noisy)
    found = network(pixels, torch.zeros(2, *network.noise_shape(32, 32)))
    assert torch.equal(found.latents, latents.encode(noisy, pixels).mean)
    assert network.vae.decoder.training and vae.config.noise_tau == 0.8


@pytest.mark.parametrize(
    ("change", "field"),
    [({"dtype": "fp16", "name": "AutoencoderKL"}, "latent_store"), ({"model": {"kind": "vq"}}, "latent_store")],
)
def test_what_no_decoder_learns_from_is_refused(
    change: dict[str, Any], field: str, images: Path, base: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    if (name := change.pop("name", None)) is not None:  # of another network
        vae = tiny(name)
        write_store(vae, open_images(str(images), vae), store, resolution=32, num_workers=0)
        change = {}
    path = settings_of(tmp_path / "run", images, base, latent_store=str(store), **change)
    if change:
        with refused(UsageError, field):
            config.load(Training, path)
    else:
        assert "was made by another encoder" in one_sentence(run(path), 2)


def test_a_decoder_that_draws_is_refused_before_it_is_built(images: Path, tmp_path: Path) -> None:
    tiny("ConsistencyDecoderVAE").save_pretrained(tmp_path / "vae")
    with refused(UsageError, "model"):
        build_autoencoder(config.load(Training, settings_of(tmp_path / "run", images, tmp_path / "vae")))
