"""One process with batch 2B and two with batch B each train the same network: in fp64, to rounding (see parity.py)."""

from __future__ import annotations

import math
from pathlib import Path

import parity
import pytest
import torch
from kills import ranks
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
# the gradient of a key's bias is zero but for rounding (softmax does not see it), which Adam divides by itself
KEYS = ("to_k.bias", "to_qkv.bias")

# some twenty scenarios of 3 or 4 steps in one launch: minutes where others share its cores
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity")
    for processes in (1, 2):
        for done in [rank.wait(900) for rank in ranks(parity.main, [str(out)], processes)]:
            assert done.returncode == 0, done.stderr
    return out


def load(results: Path, scenario: str, *sides: str) -> list[Tensors]:
    """1.0 one process, 2.0 rank 0 of two, 2.1 rank 1 of two."""
    return [load_file(results / f"{scenario}.{side}.safetensors") for side in sides]


def distance(ours: Tensors, theirs: Tensors, prefix: str = "") -> float:
    """Largest relative difference of a tensor, by its norm."""
    names = [name for name in ours if name.startswith(prefix)]
    assert names
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)) for name in names)


@pytest.mark.parametrize(
    "scenario",
    [
        "plain",
        "codebook",
        "controlled",
        "regularised",
        "accumulated",
        "game_2",
        "codes_2",
        "residual_2",
        "alpha_2",
        "heads_2",
        "clips_2",
        "sounds_2",
    ],
)
def test_one_process_and_two_are_the_same(results: Path, scenario: str) -> None:
    one, two, other = load(results, scenario, "1.0", "2.0", "2.1")
    assert all(torch.equal(two[name], other[name]) for name in two), "the ranks are not bit-equal"
    assert distance(one, two, "first.") < 1e-10  # losses, adaptive weight and gradient norms of the first step
    meant = [{name: value for name, value in side.items() if not name.endswith(KEYS)} for side in (one, two)]
    assert distance(*meant) < 1e-10  # weights of both networks after the last step
    assert distance(one, two) < 1e-6


def test_the_controller_and_the_variance_have_moved(results: Path) -> None:
    (one,) = load(results, "controlled", "1.0")
    assert one["objective.terms.likelihood.logvar"].item() != 0.0
    assert one["objective.terms.target.log_beta"].item() != pytest.approx(math.log(1e-4))


def test_an_unreduced_adaptive_weight_is_seen(results: Path) -> None:
    one, two = load(results, "no_reduce", "1.0", "2.0")
    assert distance(one, two, "first.adversary/weight") > 1e-6
    assert distance(one, two, "vae.") > 1e-6


def test_going_round_ddp_is_seen(results: Path) -> None:
    two, other = load(results, "bypass", "2.0", "2.1")
    assert distance(two, other, "vae.") > 1e-3, "each rank should have trained a model of its own"


def test_accumulation_is_its_own_thing(results: Path) -> None:
    # the adaptive weight is per micro-batch, so two micro-batches are not one batch of twice the size; documented
    (plain,), (accumulated,) = load(results, "plain", "1.0"), load(results, "accumulated", "1.0")
    assert distance(plain, accumulated, "vae.") > 1e-6


@pytest.mark.parametrize("scenario", ["game", "codes", "residual", "alpha", "clips", "sounds"])
def test_with_a_fixed_weight_two_micro_batches_are_one_batch(results: Path, scenario: str) -> None:
    """R1, LeCAM, controller and variance; a codebook with its restarts: on one process and on two."""
    (whole,) = load(results, f"{scenario}_1", "1.0")
    halves, on_two = load(results, f"{scenario}_2", "1.0", "2.0")
    for other in (halves, on_two):
        ours = {
            name: value for name, value in other.items() if not name.startswith("first.") and not name.endswith(KEYS)
        }
        assert distance(ours, whole) < 1e-9
