"""eval.scale: what is simulated agrees with its closed form, and with what must be true of both."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from sentences import refused

from eval.scale import __main__ as scale
from eval.scale.failures import Outcome, Run, best_interval, expected_failures, expected_wall, simulate
from eval.scale.transfers import (
    Transfer,
    expected_pool,
    expected_transfer,
    given_up,
    simulate_pool,
    simulate_transfer,
    wait,
)
from ldm_vae.core import fsspec_files
from ldm_vae.core.errors import UsageError, WorkError

RUN = Run(work=100_000.0, interval=600.0, checkpoint=10.0, restart=60.0, node_mtbf=64 * 3_000.0, nodes=64)


@pytest.mark.parametrize(
    "run",
    [RUN, replace(RUN, interval=60.0), replace(RUN, interval=5_000.0), replace(RUN, checkpoint=0.0, restart=2_000.0)],
    ids=["usual", "often", "seldom", "slow restart"],
)
def test_the_simulation_agrees_with_daly(run: Run) -> None:
    # the last piece is shorter than the others where the interval does not divide the work
    exact = replace(run, work=np.ceil(run.work / run.interval) * run.interval)
    walls = np.array([simulate(exact, seed).wall for seed in range(400)])
    error = walls.std(ddof=1) / np.sqrt(len(walls))
    assert abs(walls.mean() - expected_wall(exact)) < 4 * error
    assert error < 0.03 * walls.mean()  # or the line above says nothing


@pytest.mark.parametrize(
    "run",
    [
        replace(RUN, away=900.0),
        replace(RUN, away=5_000.0, interval=2_000.0, restart=600.0),
        # a spot node that encodes; one in whose place there is another at once
        Run(work=300_000.0, interval=300.0, checkpoint=0.0, restart=60.0, node_mtbf=3_000.0, away=600.0),
        Run(work=300_000.0, interval=300.0, checkpoint=0.0, restart=60.0, node_mtbf=3_000.0, away=0.0),
    ],
    ids=["several", "long away", "one", "at once"],
)
def test_preempted_nodes_agree_with_the_closed_form(run: Run) -> None:
    exact = replace(run, work=np.ceil(run.work / run.interval) * run.interval)
    found = [simulate(exact, seed) for seed in range(300)]
    for times, expected in (
        ([one.wall for one in found], expected_wall(exact)),
        ([one.wall - one.away for one in found], expected_failures(exact) / exact.rate),
        ([one.failures for one in found], expected_failures(exact)),
    ):
        agree(np.array(times), expected, 0.03)
    assert (expected_wall(exact) > expected_failures(exact) / exact.rate) == (run.away > 0)


def agree(measured: np.ndarray, expected: float, precision: float) -> None:
    """The mean of independent measurements is within four standard errors, which are small enough to say something."""
    error = measured.std(ddof=1) / np.sqrt(len(measured))
    assert abs(measured.mean() - expected) < 4 * error
    assert error < precision * expected


@pytest.mark.parametrize("failing", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("size", [1e5, 1e9])
def test_transfers_agree_with_the_closed_form(size: float, failing: float) -> None:
    transfer = Transfer(size, first_byte=0.15, bandwidth=85e6, failing=failing)
    draw = np.random.default_rng(0)
    found = [simulate_transfer(transfer, draw) for _ in range(6_000)]
    agree(np.array([seconds for seconds, _ in found]), expected_transfer(transfer), 0.04)
    if failing == 0.5:
        agree(np.array([float(given) for _, given in found]), given_up(transfer), 0.15)
    else:
        assert given_up(transfer) < 1e-7 and not any(given for _, given in found)
    # of several connections none is idle, but for the end, by a transfer at most
    walls = [simulate_pool(transfer, 4, 200, seed) for seed in range(10)]
    late = np.array([wall for wall, _ in walls]) - expected_pool(transfer, 4, 200)
    longest = max(longest for _, longest in walls)
    error = late.std(ddof=1) / np.sqrt(len(late)) + 1e-6
    assert -4 * error < late.mean() < longest + 4 * error < 0.5 * expected_pool(transfer, 4, 200)


def test_the_waits_are_those_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(fsspec_files.time, "sleep", waited.append)

    def fails() -> None:
        raise ConnectionResetError("reset")

    with refused(WorkError, "after 6 attempts"):
        fsspec_files.patiently("s3://bucket/object", fails, fsspec_files.ATTEMPTS)
    assert len(waited) == 5
    for failed, seconds in enumerate(waited, 1):
        assert 0.5 * wait(failed) <= seconds <= wait(failed)


def test_nothing_fails() -> None:
    never = replace(RUN, node_mtbf=1e15)
    assert simulate(never, 0) == Outcome(wall=100_000 + 167 * 10, failures=0, lost=0.0)
    assert expected_wall(never) == pytest.approx(100_000 * 610 / 600, rel=1e-6)


def test_a_failure_loses_half_an_interval() -> None:
    outcomes = [simulate(RUN, seed) for seed in range(200)]
    failures = sum(outcome.failures for outcome in outcomes)
    assert failures / sum(outcome.wall for outcome in outcomes) == pytest.approx(1 / 3_000, rel=0.05)
    assert sum(outcome.lost for outcome in outcomes) / failures == pytest.approx(0.5 * 610, rel=0.07)


def test_youngs_interval_is_near_the_best() -> None:
    intervals = np.geomspace(50, 5_000, 200)
    best = intervals[np.argmin([expected_wall(replace(RUN, interval=interval)) for interval in intervals])]
    assert best_interval(RUN) == pytest.approx(np.sqrt(2 * 10 * 3_000)) == pytest.approx(best, rel=0.1)


def test_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.scale", "--nodes", "8", "--images", "20000000"])
    monkeypatch.setattr(scale, "REPETITIONS", 20)
    monkeypatch.setattr(scale, "TRANSFERS", 50)
    scale.main()
    said = capsys.readouterr().out
    assert "| shards of 2,048 | 9,766 of 34 MB, 29,298 files |" in said
    assert "| latents of an image (f8, 4 channels, mean and logvar, fp16) | 16 KiB |" in said
    assert said.count("(Young's)") == 1 and "one fails every 788 hours" in said
    # dollars: GPU-hours of 10^6 images; of spot nodes half of it, and what is lost
    assert "| one launch | 8 | 10.4 | 1.39 | 2.78 |" in said
    assert "| `--engine ray`, spot nodes | 128 | 0.659 | 1.4 | 1.4 |" in said
    assert "| an image of 100 KB | 0.0% |" in said and "| training, 3 min between" not in said
    for flag, value in (("nodes", "0"), ("spot_share", "1.5"), ("request_failing", "0.3")):
        monkeypatch.setattr(sys, "argv", ["eval.scale", f"--{flag}", value])
        with refused(UsageError, flag):
            scale.main()
