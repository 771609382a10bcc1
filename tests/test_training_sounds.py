"""Training on sounds: an Oobleck from scratch and fine-tuned, resumed to the bit; what is of images is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sentences import refused
from sound_files import RATE
from sound_runs import MODEL, TERMS, sound_config
from tiny_classes import SOUNDS, sounds_for, tiny
from training_runs import assert_same_run, metrics, one_sentence, run

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import own_rate, recorded
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.training.config import Training, build_autoencoder, build_network, build_objective, learning
from ldm_vae.training.dry_run import describe
from ldm_vae.training.smallest_crop import check_smallest
from ldm_vae.training.state import build_state


def settings_of(tmp_path: Path, **changes: Any) -> Training:
    return config.load(Training, sound_config(tmp_path, **changes))


def test_an_oobleck_trains_from_scratch(tmp_path: Path) -> None:
    done = run(sound_config(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss/l1"] < lines[0]["loss/l1"] and lines[-1]["kl_nats_per_image"] > 0
    vae = load_autoencoder(tmp_path / "run")
    record = recorded(vae)
    assert type(vae).__name__ == "AutoencoderOobleck" and record is not None
    assert (record.signal, record.sample_rate, record.samples, record.channels) == ("audio", RATE, 256, 1)
    assert vae.config.sampling_rate == RATE and "scaling_factor" not in vae.config
    assert (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.slow
def test_a_run_is_resumed_to_the_bit_and_fine_tuned(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, flags in ((whole, []), (parts, ["--max_train_images", "32"]), (parts, [])):
        folder.mkdir(exist_ok=True)
        done = run(sound_config(folder), *flags)
        assert done.returncode == 0, done.stderr
    assert_same_run(whole / "run", parts / "run")
    tuned = run(sound_config(tmp_path, model={"kind": "pretrained", "in_channels": 1}, init_from=str(whole / "run")))
    assert tuned.returncode == 0, tuned.stderr
    assert type(load_autoencoder(tmp_path / "run")).__name__ == "AutoencoderOobleck"


@pytest.mark.parametrize("name", SOUNDS)
def test_a_step_moves_what_has_a_part_and_nothing_else(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    geometry, sounds = geometry_of(vae), sounds_for(vae)
    rate, terms = own_rate(vae), {"l1": {}} if geometry_of(vae).is_point else TERMS
    data = {"channels": geometry.in_channels, "sample_rate": rate, "samples": sounds.shape[2]}
    settings = settings_of(
        tmp_path, init_from="none", model={"kind": "pretrained", "in_channels": geometry.in_channels}, losses=terms,
        data=data,
    )  # fmt: skip
    vae = learning(vae, ["*"])
    state = build_state(settings, Accelerator(cpu=True), vae)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    noise = torch.randn(2, *state.network.noise_shape(*sounds.shape[2:]), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        logs = state.step(sounds, noise, 2, None)
    assert torch.isfinite(logs["loss/total"]) and logs["loss/l1"] > 0
    expected = {key for key, one in vae.named_parameters() if one.requires_grad}
    moved = {key for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= expected and len(moved) > 0.8 * len(expected) > 0


def test_the_l1_of_a_step_is_that_of_the_decoded_sounds(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, losses={"l1": {}, "kl": {"weight": 0.0}})
    vae = build_autoencoder(settings)
    network, objective = build_network(settings, vae), build_objective(settings)
    objective.attach(network)
    sounds = sounds_for(vae)
    noise = torch.zeros(2, *network.noise_shape(*sounds.shape[2:]))
    found = network(sounds, noise)
    _, logs = objective.pixel_terms(found.pixels, found)
    with torch.no_grad():
        decoded = latents.decode(vae, latents.encode(vae, sounds).mean)
    torch.testing.assert_close(logs["loss/l1"], (decoded - sounds).abs().mean())
    _, of_latents = objective.latent_terms(found)
    kl = found.moments.kl()
    torch.testing.assert_close(of_latents["loss/kl"], kl.sum() / sounds.numel())
    torch.testing.assert_close(
        of_latents["bits_per_pixel"], kl.sum() / 2 / sounds.shape[2] / torch.log(torch.tensor(2.0))
    )


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "data.samples": {"data": {"samples": None}},
    "data.sample_rate": {"data": {"sample_rate": 16000}},
    "resolution": {"resolution": 64},
    "buckets": {"buckets": {"step": 8}},
    "data.holdout": {"data": {"holdout": 0.5}},
    "perturbations.eq": {"perturbations": {"eq": {}}},
    "data.channels": {"data": {"channels": 2}},
    "downsampling_ratios": {"model": MODEL | {"downsampling_ratios": [3, 4]}},
    "channel_multiples": {"model": MODEL | {"channel_multiples": [1]}},
    "encoder_hidden_size": {"model": MODEL | {"encoder_hidden_size": 7}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_config_that_sounds_cannot_have_is_refused(field: str, tmp_path: Path) -> None:
    changes = {**REFUSED[field]}
    side = changes.pop("resolution", None)
    path = sound_config(tmp_path, **changes)
    if side is not None:
        path.write_text(f"{path.read_text()}resolution: {side}\n")
    with refused(UsageError, field):
        config.load(Training, path)


@pytest.mark.parametrize("term", ["ssim", "haar", "lpips", "gaussian_nll", "focal_frequency", "temporal_difference"])
def test_terms_of_images_are_refused(term: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, losses={"l1": {}, term: {}})
    objective = build_objective(settings, outline=True)
    with refused(UsageError, f"losses.{term}"):
        objective.attach(build_network(settings, build_autoencoder(settings)))


def test_a_discriminator_of_images_is_refused(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, adversary={"weight": 0.5}, discriminator={"kind": "patchgan"})
    with refused(UsageError, "discriminator"):
        check_smallest(settings, 8)


def test_another_signal_is_refused_in_training(tmp_path: Path) -> None:
    image = write_vae(tiny("AutoencoderKL"), tmp_path / "image", None)
    sounds = settings_of(tmp_path, model={"kind": "pretrained", "in_channels": 3}, init_from=str(image),
                         data={"channels": 3})  # fmt: skip
    with refused(UsageError, "data.sample_rate"):
        build_autoencoder(sounds)
    other = write_vae(tiny("AutoencoderOobleck", audio_channels=1, sampling_rate=16000), tmp_path / "other", None)
    with refused(UsageError, "data.sample_rate"):  # of another rate than its config's
        build_autoencoder(settings_of(tmp_path, init_from=str(other), model={"kind": "pretrained", "in_channels": 1}))
    odd = settings_of(tmp_path, data={"samples": 250})
    with refused(UsageError, "data.samples"):
        build_autoencoder(odd)


def test_sounds_without_data_samples_end_in_one_sentence(tmp_path: Path) -> None:
    assert "data.samples" in one_sentence(run(sound_config(tmp_path, data={"samples": 250})), 2)


def test_the_plan_counts_sounds(tmp_path: Path) -> None:
    said = describe(settings_of(tmp_path))
    assert "latents 4 x 32" in said and "2 excerpts of 256 samples" in said and "f 8" in said
