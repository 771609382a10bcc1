"""Training on sounds: an Oobleck from scratch and fine-tuned, resumed to the bit; what is of images is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from accelerate import Accelerator
from cli_call import call
from sentences import refused
from sound_files import RATE, encoded, write_sounds
from sound_runs import MODEL, TERMS, sound_config
from splits import split
from tiny_classes import SOUNDS, sounds_for, tiny
from training_runs import assert_same_run, metrics, one_sentence, run

from ldm_vae import LatentDataset
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import own_rate, recorded
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.data.source import open_source
from ldm_vae.data.windows import video_of
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.training.config import Training, build_autoencoder, build_network, build_objective, learning
from ldm_vae.training.dry_run import describe
from ldm_vae.training.smallest_crop import check_smallest
from ldm_vae.training.state import build_state
from train.autoencoder import train


def settings_of(tmp_path: Path, **changes: Any) -> Training:
    return config.load(Training, sound_config(tmp_path, **changes))


def test_an_oobleck_trains_from_scratch(tmp_path: Path) -> None:
    done = run(sound_config(tmp_path, max_train_images=32))
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
    short = {"max_train_images": 16, "log_every_images": 4, "checkpoint_every_images": 8}
    for folder, flags in ((whole, []), (parts, ["--max_train_images", "8"]), (parts, [])):
        folder.mkdir(exist_ok=True)
        done = run(sound_config(folder, **short), *flags)
        assert done.returncode == 0, done.stderr
    assert_same_run(whole / "run", parts / "run")
    base = {"model": {"kind": "pretrained", "in_channels": 1}, "init_from": str(whole / "run"), "max_train_images": 4}
    tuned = run(sound_config(tmp_path, **base))
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


# --- hold-out, and the decoder alone ----------------------------------------------------------------------------------


def test_sounds_are_held_out_by_key_with_their_copies(tmp_path: Path) -> None:
    """A file is in one part with all its excerpts, and a training copy of a held-out one in none."""
    path = sound_config(tmp_path, data={"holdout": 0.4}, max_train_images=4, checkpoint_every_images=4,
                        validate_every_images=4, validation_metrics=["si_sdr"], best_metric="si_sdr")  # fmt: skip
    folder, fields = write_sounds(tmp_path / "sounds", 7), {"channels": 1, "sample_rate": RATE}
    original = split(open_source(folder, **fields), 0.4)[1][0]
    samples, _ = soundfile.read(folder / original, dtype="float32", always_2d=True)
    for number in range(20):
        copy = folder / f"copy{number}.flac"
        copy.write_bytes(encoded(samples / 3, "FLAC"))
        learned, held = split(open_source(folder, **fields), 0.4)
        if copy.name in learned:
            break
        copy.unlink()
    train(config.load(Training, path))
    found = json.loads((tmp_path / "run" / "inventory" / "holdout.json").read_text())
    assert found["copies"] == {copy.name: original} and "validation/si_sdr" in metrics(tmp_path / "run")[-1]
    for part, names in (("train", {*learned} - {copy.name}), ("holdout", {*held})):
        call("encode", tmp_path / "run", folder, tmp_path / part, "--num_workers", 0, "--part", part)
        stored = LatentDataset(tmp_path / part, columns=("key",))
        keys = [stored.row(index, ("key",))["key"] for index in range(len(stored))]
        assert len(keys) == 16 * len(names) > 0 and {video_of(key)[0] for key in keys} == names
    with refused(UsageError, "--part"):
        call("encode", tmp_path / "run", tmp_path, tmp_path / "out", "--part", "train")


def test_a_run_from_a_store_is_the_run_from_its_sounds(tmp_path: Path) -> None:
    """The decoder alone, of files of one excerpt: there is but one place to draw."""
    folder = write_sounds(tmp_path / "sounds", 5, samples=250)
    base = write_vae(tiny("AutoencoderOobleck", audio_channels=1), tmp_path / "vae", None)
    call("encode", base, folder, tmp_path / "store", "--excerpt", 256, "--dtype", "fp32", "--batch_size", 2,
         "--num_workers", 0)  # fmt: skip
    changes = {"model": {"kind": "pretrained", "in_channels": 1}, "init_from": str(base), "trainable": ["decoder.*"],
               "losses": {"l1": {}}, "max_train_images": 12}  # fmt: skip
    runs = []
    for store in (None, str(tmp_path / "store")):
        place = tmp_path / ("stored" if store else "plain")
        place.mkdir()
        data = {"data": {"path": str(folder)}}
        train(config.load(Training, sound_config(place, **changes, **data, latent_store=store)))
        runs.append(place / "run")
    ours, theirs = (load_autoencoder(one).state_dict() for one in runs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert metrics(runs[0]) == metrics(runs[1])
    before = load_autoencoder(base).state_dict()
    moved = {name for name, value in ours.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("decoder.") for name in moved)
    other = sound_config(tmp_path, **changes, data={"path": str(folder), "samples": 128}, latent_store=store)
    with refused(UsageError, "resolution"):
        train(config.load(Training, other))


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "data.samples": {"data": {"samples": None}},
    "data.sample_rate": {"data": {"sample_rate": 16000}},
    "resolution": {"resolution": 64},
    "buckets": {"buckets": {"step": 8}},
    "transform": {"transform": {"crop": "centre"}},
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
        check_smallest(settings, build_autoencoder(settings))


@pytest.mark.parametrize("term", ["multi_scale_mel", "multi_resolution_stft"])
def test_an_excerpt_without_room_for_a_window_is_refused_before_the_first_step(term: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, losses={"l1": {}, term: {}}, data={"samples": 1024})
    with refused(UsageError, f"losses.{term}"):
        check_smallest(settings, build_autoencoder(settings))
    longer = settings_of(tmp_path, losses={"l1": {}, term: {}}, data={"samples": 1032})
    check_smallest(longer, build_autoencoder(longer))


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
