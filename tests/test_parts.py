"""The small parts: keyed randomness, moments and normalisation, schedule, EMA, adversary, PatchGAN, logbook."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from sentences import refused
from torch import nn

from ldm_vae.autoencoder.last_layer import Call
from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.run.ema import Ema
from ldm_vae.run.metrics_log import Averages, Logbook, check_finite
from ldm_vae.run.optim import schedule
from ldm_vae.training.adaptive_weight import last_layer_gradient
from ldm_vae.training.adversary import Adversary, AdversaryConfig

# --- keyed ------------------------------------------------------------------------------------------------------------


def test_weights_drawn_by_a_seed_leave_the_generator_and_the_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"asked GPU {device}"))
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with rng.seeded(3):
            drawn.append(torch.randn(4))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn)


def test_a_draw_depends_on_its_key_alone() -> None:
    together = rng.normal(3, "posterior", [5, 6, 7], (2, 4))
    assert torch.equal(together[1], rng.normal(3, "posterior", [6], (2, 4))[0])
    assert torch.equal(rng.normal(3, "x", [(1, 2)], (4,)), rng.normal(3, "x", [(1, 2)], (4,)))
    others = [rng.normal(4, "posterior", [6], (2, 4)), rng.normal(3, "other", [6], (2, 4))]
    assert all(not torch.equal(together[1], other[0]) for other in others)
    assert not torch.equal(together[0], together[1])


def test_keyed_noise_is_standard_normal() -> None:
    noise = posterior_noise(0, range(64), (4, 16, 16))
    assert noise.dtype == torch.float32 and noise.shape == (64, 4, 16, 16)
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01


def test_coordinates_do_not_overlap_with_long_draws() -> None:
    # the generator counts in word 0, coordinates stand in the others: a long draw never runs into the next key
    long = rng.generator(0, "s", 1).integers(0, 2**63, 10_000)
    following = rng.generator(0, "s", 2).integers(0, 2**63, 100)
    assert not np.isin(following, long).any()


# --- moments, normalisation -------------------------------------------------------------------------------------------


def test_moments_are_diffusers_posterior() -> None:
    parameters = torch.randn(3, 8, 5, 5) * 20  # some logvar beyond the clamp
    theirs = DiagonalGaussianDistribution(parameters)
    ours = Moments.from_parameters(parameters)
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.logvar, theirs.logvar)
    torch.testing.assert_close(ours.kl().sum(dim=(1, 2, 3)), theirs.kl())
    torch.testing.assert_close(ours.sample(torch.ones_like(ours.mean)), theirs.mean + theirs.std)


@pytest.mark.parametrize("kind", ["scale", "shift", "channel"])
def test_normalised_latents_have_unit_variance_and_come_back(kind: str) -> None:
    z = torch.randn(512, 4, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4]).view(-1, 1, 1) + 5
    mean, variance = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3), unbiased=False)
    normalisation = Normalisation.from_statistics(kind, mean, variance)
    assert normalisation.kind == kind
    latents = normalisation.apply(z)
    assert latents.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-6)
    if kind != "scale":
        assert abs(latents.mean().item()) < 1e-6
    torch.testing.assert_close(normalisation.undo(latents), z, rtol=1e-6, atol=1e-6)
    assert Normalisation.from_config(normalisation.to_config()) == normalisation


def test_two_normalisations_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="shift_factor and latents_mean"):
        Normalisation(1.0, shift_factor=0.1, latents_mean=(0.0,), latents_std=(1.0,))


NO_NORMALISATION = {
    "scaling_factor": [0, 0.0, -0.5, float("nan"), float("inf")],
    "shift_factor": [float("nan"), float("-inf")],
    "latents_mean": [(0.0, float("nan"))],
    "latents_std": [(1.0, 0.0), (1.0, -1.0), (float("inf"), 1.0)],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, bad in NO_NORMALISATION.items() for value in bad])
def test_a_normalisation_that_cannot_be_undone_is_refused_by_its_field(field: str, value: object) -> None:
    per_channel = {"latents_mean": (0.0, 0.0), "latents_std": (1.0, 1.0)} if field.startswith("latents") else {}
    config = {"scaling_factor": 1.0} | per_channel | {field: value}
    with refused(UsageError, f"VAE mine: {field}"):
        Normalisation.from_config(config, "VAE mine")
    assert Normalisation.from_config({}) == Normalisation.from_config({"scaling_factor": None}) == Normalisation(1.0)


@pytest.mark.parametrize("kind", ["scale", "shift", "channel"])
def test_latents_that_do_not_vary_have_no_normalisation(kind: str) -> None:
    with refused(WorkError, f"normalisation {kind}"):
        Normalisation.from_statistics(kind, torch.zeros(2).double(), torch.zeros(2).double())
    dead = (torch.tensor([0.0, 9.0]).double(), torch.tensor([1.0, 0.0]).double())
    if kind != "channel":
        assert Normalisation.from_statistics(kind, *dead).scaling_factor > 0
        return
    with refused(WorkError, f"normalisation {kind}"):
        Normalisation.from_statistics(kind, *dead)


# --- schedule, EMA ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_a_function_of_images_seen() -> None:
    assert [schedule(n, 100, 1000, "constant") for n in (0, 50, 100, 900)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule(550, 100, 1000, "cosine") == pytest.approx(0.5)
    assert schedule(1000, 100, 1000, "cosine") == pytest.approx(0.0)
    assert schedule(0, 0, 1000, "cosine") == 1.0


def test_ema_follows_the_closed_form_and_counts_images() -> None:
    network = nn.Linear(1, 1, bias=False)
    averages = []
    for batch in (4, 8):  # the same images in other batches: the same average of a weight that does not move
        with torch.no_grad():
            network.weight.fill_(0.0)
        ema = Ema(network, halflife_images=16)
        with torch.no_grad():
            network.weight.fill_(1.0)
        for seen in range(1000 + batch, 1033, batch):
            ema.update(network, seen, batch)
        averages.append(ema.module.weight.item())
    assert averages[0] == pytest.approx(1 - 0.5 ** (32 / 16), rel=1e-6)
    assert averages[1] == pytest.approx(averages[0], rel=1e-6)


def test_ema_forgets_the_start_early_on() -> None:
    network = nn.Linear(1, 1, bias=False)
    ema = Ema(network, halflife_images=10**9)
    with torch.no_grad():
        network.weight.add_(1.0)
    ema.update(network, images_seen=100, batch_images=100)  # half-life 5 images: 20 half-lives
    assert ema.module.weight.item() == pytest.approx(network.weight.item(), abs=1e-5)


# --- adversary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "ignorant", "generator"),
    [("hinge", 1.0, -2.0), ("vanilla", math.log(2), -2.0), ("non_saturating", math.log(2), math.log1p(math.exp(-2)))],
)
def test_adversarial_losses_against_closed_forms(loss: str, ignorant: float, generator: float) -> None:
    game = Adversary(AdversaryConfig(loss=loss))
    zero = torch.zeros(4, 1, 3, 3)
    assert game.discriminator_loss(zero, zero).item() == pytest.approx(ignorant)
    assert game.generator_loss(zero + 2).item() == pytest.approx(generator)
    assert game.discriminator_loss(zero + 9, zero - 9).item() < 1e-3


def test_who_plays_when() -> None:
    game = Adversary(AdversaryConfig(start_images=100, warmup_images=30))
    assert [game.discriminator_plays(n) for n in (69, 70, 100)] == [False, True, True]
    assert [game.generator_plays(n) for n in (70, 99, 100)] == [False, False, True]
    assert not Adversary(AdversaryConfig(weight=0.0)).discriminator_plays(10**9)


def test_the_last_layer_gradient_is_autograds_even_when_tiny() -> None:
    layer = nn.Conv2d(4, 3, 3, padding=1)
    hidden = torch.randn(2, 4, 8, 8)
    calls = [Call((hidden,), None)]
    cotangent = torch.randn(2, 3, 8, 8) * 1e-38
    (expected,) = torch.autograd.grad(layer(hidden).double(), layer.weight, cotangent.double() * 1e30)
    torch.testing.assert_close(
        last_layer_gradient(layer, calls, hidden, cotangent * 1e30), expected, rtol=1e-4, atol=1e-12
    )
    tiny = last_layer_gradient(layer, calls, hidden, cotangent * 1e8)
    torch.testing.assert_close(tiny * 1e22, expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("norm", ["group", "spectral", "none", "batch"])
@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_patchgan_sees_patches_of_the_published_size(norm: str, layers: int, patch: int) -> None:
    critic = PatchGAN(width=4, layers=layers, norm=norm).build().eval()
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    logits = critic(images)
    assert logits.shape[1] == 1
    if norm in ("none", "spectral", "batch"):  # a group norm sees the whole image
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 == patch


def test_patchgan_is_as_narrow_as_it_is_asked_to_be() -> None:
    critic = PatchGAN(width=1, layers=1).build()
    assert [layer.num_groups for layer in critic.network if isinstance(layer, nn.GroupNorm)] == [1]


# --- logbook ----------------------------------------------------------------------------------------------------------


def test_averages_are_means_over_the_steps_that_had_the_name() -> None:
    averages = Averages()
    averages.update({"a": torch.tensor(1.0)})
    averages.update({"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    accelerator = Accelerator(cpu=True)
    assert averages.means(accelerator) == {"a": 2.0, "b": 5.0}
    resumed = Averages()
    resumed.load_state_dict(averages.state_dict())
    resumed.update({"a": torch.tensor(5.0)})
    assert resumed.means(accelerator) == {"a": 3.0, "b": 5.0}
    resumed.reset()
    assert resumed.means(accelerator) == {}


def test_nan_shows_in_a_mean_unless_it_is_skipped() -> None:
    accelerator = Accelerator(cpu=True)
    for skip, expected in ((False, math.nan), (True, 2.0)):
        averages = Averages(skip)
        for value in (1.0, math.nan, 3.0):
            averages.update({"a": torch.tensor(value)})
        assert averages.means(accelerator)["a"] == pytest.approx(expected, nan_ok=True)


def test_nan_names_the_term_and_the_interval() -> None:
    check_finite({"a": 1.0}, 0, 10, "nothing")
    with refused(WorkError, "loss/kl"):
        check_finite({"loss/l1": 1.0, "loss/kl": math.nan}, 1000, 2000, "images-000001000 is kept")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    book = Logbook(tmp_path / "metrics.jsonl", Accelerator(cpu=True))
    for images in (10, 20, 30):
        book.write(images, {"loss/l1": 1 / images})
    with book.path.open("a") as file:
        file.write('{"images": 40, "loss')  # what a kill left
    book.cut_back(20)
    book.write(30, {"loss/l1": 0.5})
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    assert [line["images"] for line in lines] == [10, 20, 30] and lines[-1]["loss/l1"] == 0.5
    assert lines[0]["num_processes"] == 1 and "num_processes" not in lines[1]
