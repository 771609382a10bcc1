"""A tiny autoencoder is distilled of any class of images: it learns latents as that class's pipelines have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sentences import refused
from tiny_classes import IMAGES, pixels_for, tiny

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.perceptual.teacher import teacher
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.config import Training, build_autoencoder, build_network, build_objective
from ldm_vae.training.step import TrainingStep
from ldm_vae.training.teachers import check_teachers

TEACHERS = [name for name in IMAGES if own_normalisation(tiny(name)) is not None]


def settings_of(folder: Path, channels: int, widths: int, image_channels: int, **changes: Any) -> Training:
    blocks = {f"num_{side}_blocks": [1] * widths for side in ("encoder", "decoder")}
    model = {f"{side}_block_out_channels": [8] * widths for side in ("encoder", "decoder")} | blocks
    raw = {
        "output_dir": "unused", "resolution": 32,
        "data": {"kind": "folder", "path": "nowhere", "channels": image_channels, "alpha": image_channels == 4},
        "model": {"kind": "tiny", "latent_channels": channels, "in_channels": image_channels, **model},
        "losses": {"l1": {}, "drift": {"teacher": str(folder), "latents": "normalised"}},
        "perturbations": {"teacher_latents": {"teacher": str(folder)}},
    }  # fmt: skip
    return config.validate(Training, raw | changes, "test")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_tiny_network_learns_what_its_teachers_pipelines_see(name: str, tmp_path: Path) -> None:
    base = tiny(name)
    base.save_pretrained(tmp_path)
    geometry, images = geometry_of(base), pixels_for(base)
    settings = settings_of(tmp_path, geometry.latent_channels, geometry.factor.bit_length(), geometry.in_channels)
    vae = build_autoencoder(settings)
    check_teachers(settings, vae)
    network, objective = build_network(settings, vae), build_objective(settings)
    optimizer = settings.optimizer.build(trainable_parameters([network]), 1e-2)
    step = TrainingStep(Accelerator(cpu=True), network, objective, optimizer, Adversary(settings.adversary))
    noise = torch.zeros(2, *network.noise_shape(32, 32))
    losses = [step(images, noise, 0) for _ in range(25)]
    assert losses[-1]["loss/drift"] < 0.95 * losses[0]["loss/drift"], "the encoder learns"
    # the target: what the class's pipelines normalise z to, before FLUX.2's patches
    with torch.no_grad():
        seen = own_normalisation(base).apply(latents.encode(base, images).mean)
        expected = torch.pixel_shuffle(seen, own_normalisation(base).patch)
        assert torch.equal(teacher(str(tmp_path))(images, normalised=True), expected)
        assert network(images, noise).latents.shape == expected.shape


def test_drift_of_a_patchified_class_is_of_its_latents(tmp_path: Path) -> None:
    base = tiny("AutoencoderKLFlux2")
    base.save_pretrained(tmp_path)
    raw = {"losses": {"l1": {}, "drift": {"teacher": str(tmp_path)}}, "init_from": str(tmp_path), "perturbations": {}}
    settings = settings_of(tmp_path, 4, 2, 3, model={"kind": "pretrained"}, **raw)
    network, objective = build_network(settings, build_autoencoder(settings)), build_objective(settings)
    images = pixels_for(base)
    found = network(images, torch.zeros(2, *network.noise_shape(32, 32)))
    _, logs = objective.latent_terms(found)
    assert float(logs["loss/drift"]) < 1e-10  # nothing has moved yet


@pytest.mark.parametrize(
    ("name", "changes", "channels", "widths", "resolution"),
    [
        ("AutoencoderDC", {}, 8, 2, 32),  # another number of channels
        ("AutoencoderDC", {}, 4, 3, 32),  # another f
        ("AutoencoderRAE", {"encoder_patch_size": 16, "patch_size": 12}, 64, 4, 24),  # no power of 2
        ("AutoencoderRAE", {}, 64, 4, 64),  # another size
    ],
)
def test_a_teacher_of_another_shape_is_refused(
    name: str, changes: dict[str, Any], channels: int, widths: int, resolution: int, tmp_path: Path
) -> None:
    tiny(name, **changes).save_pretrained(tmp_path)
    settings = settings_of(tmp_path, channels, widths, 3, resolution=resolution)
    with refused(UsageError, "resolution" if resolution == 64 else "losses.drift.teacher"):
        check_teachers(settings, build_autoencoder(settings))


def test_a_teacher_of_other_images_is_refused(tmp_path: Path) -> None:
    tiny("AutoencoderDC").save_pretrained(tmp_path)
    settings = settings_of(tmp_path, 4, 2, 1)
    with refused(UsageError, "losses.drift.teacher"):
        check_teachers(settings, build_autoencoder(settings))


def test_widths_that_the_class_cannot_have_are_refused() -> None:
    with refused(UsageError, "encoder_block_out_channels"):
        settings_of(Path("x"), 4, 2, 3, model={"kind": "tiny", "encoder_block_out_channels": [32, 64, 64, 64]})
