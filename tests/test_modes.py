"""Models beside a truth that can be listed: distances, quadrature, bounds, and eval.modes as a user runs it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from prior_runs import MASKED
from sentences import refused

from eval.modes import __main__ as program
from eval.modes import evidence, network
from eval.modes.network import Likelihood, Network
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.demo import factors
from ldm_vae.latent_space.disentanglement import entropies, information_gaps, mutual_information, rotated
from ldm_vae.latent_space.enumeration import compare, entropy_bits, look_up, merged, sampled
from ldm_vae.latent_space.likelihood import importance_bounds
from ldm_vae.latent_space.quadrature import log_evidence
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.models.vq import Config as VQ
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.sampling import SamplingConfig
from ldm_vae.priors.masked import Config as Masked
from ldm_vae.priors.transformer import Config as Transformer

# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_are_their_definitions() -> None:
    truth = torch.tensor([0.5, 0.25, 0.25]).double()
    found = compare(truth, -torch.tensor([0.25, 0.25, 0.125]).double().log(), 2)
    assert found["kl_bits"] == pytest.approx(0.5 * 1 + 0.25 * 0 + 0.25 * 1)
    assert found["cross_entropy_bits"] == pytest.approx(0.5 * 2 + 0.25 * 2 + 0.25 * 3)
    assert found["outside"] == pytest.approx(0.375)
    assert found["total_variation"] == pytest.approx(0.5 * (0.25 + 0 + 0.125 + 0.375))
    assert found["coverage"] == pytest.approx(0.75 * (1 - 0.75**2) + 0.25 * (1 - 0.875**2))
    same = compare(truth, -truth.log(), 10**9)
    assert [same[name] for name in ("kl_bits", "total_variation", "outside")] == pytest.approx([0, 0, 0], abs=1e-12)
    assert same["coverage"] == pytest.approx(1)
    excluded = compare(truth, torch.tensor([0.0, torch.inf, torch.inf]), 1)
    assert excluded["kl_bits"] is excluded["cross_entropy_bits"] is None and excluded["coverage"] == 0.5
    # what has no mass is not asked for
    assert compare(torch.tensor([1.0, 0.0]), torch.tensor([0.0, torch.inf]), 1)["kl_bits"] == 0
    assert entropy_bits(truth) == pytest.approx(1.5)


def test_images_with_the_same_codes_are_one_outcome() -> None:
    codes = torch.tensor([[3, 1], [0, 2], [3, 1], [5, 5]]).view(4, 1, 1, 2)
    outcomes, mass, of = merged(codes, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert outcomes.flatten(1).tolist() == [[0, 2], [3, 1], [5, 5]] and of.tolist() == [1, 0, 1, 2]
    assert mass.tolist() == pytest.approx([0.2, 0.4, 0.4])
    drawn = look_up(outcomes, torch.tensor([[5, 5], [1, 3], [3, 1], [3, 1]]).view(4, 1, 1, 2))
    assert drawn.tolist() == [2, -1, 1, 1]
    assert sampled(mass, drawn) == pytest.approx({"valid": 0.75, "coverage": 0.8})
    assert sampled(mass, torch.tensor([-1])) == {"valid": 0.0, "coverage": 0.0}


# --- the integral, and the bounds below it ----------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_integral_of_a_linear_gaussian_is_its_closed_form(dimensions: int) -> None:
    draw = torch.Generator().manual_seed(dimensions)
    loadings, shift = (torch.randn(5, size, generator=draw).double() for size in (dimensions, 1))
    x, variance = torch.randn(7, 5, generator=draw).double(), 0.05

    def log_likelihood(z: torch.Tensor) -> torch.Tensor:
        error = (x - (z @ loadings.T + shift[:, 0])[:, None]).square().sum(dim=2)
        return -0.5 * (error / variance + 5 * math.log(2 * math.pi * variance))

    found, change = log_evidence(log_likelihood, dimensions, 400)
    covariance = loadings @ loadings.T + variance * torch.eye(5).double()
    expected = torch.distributions.MultivariateNormal(shift[:, 0], covariance).log_prob(x)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert float(change.abs().max()) < 1e-9
    # a grid that is too coarse says so
    coarse, said = log_evidence(log_likelihood, dimensions, 20)
    assert float(said.abs().max()) > 0.01 and float((coarse - expected).abs().max()) > 1e-4


@pytest.fixture(scope="module")
def trained() -> tuple[Network, float]:
    return network.train(1, 1.0, 3200, 64, 0)


def test_bounds_lie_below_the_integral_in_their_order(trained: tuple[Network, float]) -> None:
    """ELBO <= IWAE <= log p(x) on average over the truth, whose entropy no model is below."""
    images, p = network.pixels(), factors.probabilities()
    likelihood, moments = Likelihood(*trained, images), trained[0].encode(images)
    weights = evidence.log_weights(likelihood, moments, 16)
    exact, change = log_evidence(likelihood.everywhere, 1, 2000)
    assert float(change.abs().max()) < 1e-6
    nats = [float(p @ bound) for bound in importance_bounds(weights, (1, 4, 16)).values()] + [float(p @ exact)]
    assert nats == sorted(nats) and nats[0] < nats[-1] - 0.1
    assert nats[-1] < -factors.entropy_bits() * math.log(2)
    found = compare(p, -exact, 1)
    assert 0 < found["outside"] < 1 and found["kl_bits"] == pytest.approx(
        -nats[-1] / math.log(2) - factors.entropy_bits()
    )


def test_a_rotated_latent_is_the_same_model_of_images_with_another_gap() -> None:
    """Locatello et al.'s theorem in one model: what no likelihood sees the gap does."""
    torch.manual_seed(0)
    images, values, p = network.pixels()[::16], factors.values()[::16], torch.full((72,), 1 / 72)
    built = Network(2)
    built.requires_grad_(False)
    likelihood = Likelihood(built, 1.0, images)
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]], dtype=torch.float64)
    exact, _ = log_evidence(likelihood.everywhere, 2, 80)
    again, _ = log_evidence(lambda z: likelihood.everywhere(z @ turn), 2, 80)  # the decoder of R^T z
    torch.testing.assert_close(again, exact, atol=1e-9, rtol=0)
    other, _ = log_evidence(lambda z: likelihood.everywhere(2 * z), 2, 80)
    assert float((other - exact).abs().max()) > 1e-3
    means = torch.stack([values[:, 0], values[:, 3]], dim=1).double()
    moments = Moments(means, torch.full_like(means, -6.0))
    entropy = entropies(values, p)
    gaps = [
        float(information_gaps(mutual_information(one, values, p), entropy).mean())
        for one in (moments, rotated(moments, turn))
    ]
    assert gaps[0] > gaps[1] + 0.1


def test_the_likelihood_is_that_of_the_training_objective(trained: tuple[Network, float]) -> None:
    images, sigma = network.pixels()[::100], trained[1]
    z = torch.randn(len(images), 1, generator=torch.Generator().manual_seed(0))
    likelihood = Likelihood(trained[0], sigma, images)
    term = GaussianNLL(levels=2, logvar=2 * math.log(sigma)).build().double()
    with torch.no_grad():
        for number, own in enumerate(likelihood.each(z)):
            pixels = likelihood.decoder(z[number : number + 1].double()).view(1, 3, 16, 16)
            expected = -float(term(pixels, images[number : number + 1].double())) * network.VALUES
            assert float(own) == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(likelihood.everywhere(z).diag(), likelihood.each(z))


# --- the program ------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.modes", *map(str, arguments)])
    program.main()


def write_prior(folder: Path, kind: str = "transformer", classes: tuple[str, ...] = (), side: int = 4) -> None:
    """vae/ and RUN/prior, neither of them trained."""
    torch.manual_seed(0)
    shape = {"latent_channels": 4, "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    VQ(num_vq_embeddings=16, mid_block_add_attention=False, **shape).build().save_pretrained(folder / "vae")
    options = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    config = Transformer(**options) if kind == "transformer" else Masked(**MASKED)
    prior = config.build(16, (1, side, side), len(classes))
    if kind == "transformer":
        torch.nn.init.normal_(prior.network.head.weight)  # it begins with all codes alike
    vae = load_autoencoder(folder / "vae")
    CodeGenerator(prior, config, vae, 16, (1, side, side), SamplingConfig(), classes).write(folder)


def test_a_prior_beside_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prior(tmp_path)
    out = tmp_path / "out"
    call = ("prior", "--run", tmp_path, "--vae", tmp_path / "vae", "--output", out)
    run(monkeypatch, *call, "--samples", 40, "--batch_size", 200)
    found = json.loads((out / "prior.json").read_text())
    assert found["images"] == 1152 and found["outcomes"] <= 1152
    assert found["entropy_of_codes_bits"] <= found["entropy_bits"] == pytest.approx(factors.entropy_bits())
    truth, log2_p = (torch.tensor(found["log2_p"][name]) for name in ("truth", "prior"))
    assert float(truth.exp2().sum()) == pytest.approx(1, abs=1e-5)
    models = found["models"]
    assert models["prior"]["outside"] == pytest.approx(1 - float(log2_p.exp2().sum()), abs=1e-5)
    assert models["prior"]["kl_bits"] == pytest.approx(float((truth.exp2() * (truth - log2_p)).sum()), rel=1e-4)
    # independent codes have the true frequency of each position, so they are nearer than a prior that learned nothing
    assert 0 < models["independent"]["kl_bits"] < models["prior"]["kl_bits"]
    assert models["training"]["kl_bits"] is None and models["training"]["outside"] == 0
    # 40 draws of the training images find less of the truth than all of them hold
    assert 0 < models["training"]["coverage"] < 1 - found["unseen"]["truth"]
    assert (out / "prior.md").read_text() in capsys.readouterr().out
    assert (out / "prior.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prior", "field"),
    [
        ({"kind": "masked"}, "exact"),
        ({"classes": ("a", "b")}, "without classes"),
        ({"side": 2}, "codes 1 x 4 x 4"),
    ],
)
def test_priors_that_cannot_be_compared_are_refused(
    prior: dict[str, object], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prior(tmp_path, **prior)  # type: ignore[arg-type]
    with refused(UsageError, field):
        run(monkeypatch, "prior", "--run", tmp_path, "--vae", tmp_path / "vae", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("prior",), "run"),
        (("evidence", "--steps", 3), "steps"),
        (("disentanglement", "--seeds", 0), "seeds"),
        (("disentanglement", "--betas", 0), "betas"),
        (("evidence", "--images", 5), "images"),
    ],
)
def test_a_wrong_call_is_refused(
    flags: tuple[object, ...], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(UsageError, field):
        run(monkeypatch, *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tables_of_vaes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "SAMPLES", (1, 4))
    run(monkeypatch, "evidence", "--output", tmp_path, "--images", 640, "--steps", 40)
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["bounds_bits"]["1"] > found["bounds_bits"]["4"] > found["exact_bits"] > found["entropy_bits"]
    assert (tmp_path / "evidence.md").read_text() in capsys.readouterr().out
    run(monkeypatch, "disentanglement", "--output", tmp_path, "--images", 640, "--seeds", 2, "--betas", 1, 4)
    found = json.loads((tmp_path / "disentanglement.json").read_text())
    assert [(one["beta"], one["seed"]) for one in found["runs"]] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    for one in found["runs"]:
        information = torch.tensor(one["information"])
        assert information.shape == (6, 5) and float(information.min()) >= 0 and float(information.max()) <= 1 + 1e-6
        top = information.sort(dim=0, descending=True).values
        assert one["mig"] == pytest.approx(float((top[0] - top[1]).mean()), abs=1e-5) and len(one["rotated"]) == 5
    assert (tmp_path / "disentanglement.md").read_text() in capsys.readouterr().out
    for name in ("evidence", "disentanglement"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
