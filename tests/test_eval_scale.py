"""eval.scale: what is simulated agrees with its closed form, and with what must be true of both."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from sentences import refused

from eval import scale
from eval.scale import Run, best_interval, expected_wall, simulate
from ldm_vae.core.errors import UsageError

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


def test_nothing_fails() -> None:
    never = replace(RUN, node_mtbf=1e15)
    assert simulate(never, 0) == scale.Outcome(wall=100_000 + 167 * 10, failures=0, lost=0.0)
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
    monkeypatch.setattr(scale, "REPETITIONS", 2)
    scale.main()
    said = capsys.readouterr().out
    assert "| shards of 2,048 | 9,766 of 34 MB, 29,298 files |" in said
    assert "| latents of an image (f8, 4 channels, mean and logvar, fp16) | 16 KiB |" in said
    assert said.count("(Young's)") == 1 and "one fails every 788 hours" in said
    monkeypatch.setattr(sys, "argv", ["eval.scale", "--nodes", "0"])
    with refused(UsageError, "nodes"):
        scale.main()
