"""eval.shuffle: what is measured of the loader's order agrees with its closed form."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sentences import refused

from eval import shuffle
from eval.shuffle import same_shard, same_shard_of_a_batch, shares, variance_of_mean, windowed
from ldm_vae.core.errors import UsageError

SHARDS, ROWS, WINDOW = 40, 24, 6


def agree(measured: np.ndarray, expected: float, precision: float) -> None:
    """The mean of independent measurements is within four standard errors, which are small enough to say something."""
    error = measured.std(ddof=1) / np.sqrt(len(measured))
    assert abs(measured.mean() - expected) < 4 * error
    assert error < precision * expected


def test_two_rows_come_from_one_shard_as_often_as_the_closed_form_says() -> None:
    longer = (WINDOW + 1) * ROWS // 2  # a segment at an end of the epoch
    found: dict[int, list[float]] = {distance: [] for distance in (1, 10, 24, 40, 100)}
    for epoch in range(40):
        inner = windowed(SHARDS, ROWS, WINDOW, 1, 1, epoch)[longer:-longer]
        for distance, measured in found.items():
            measured.append(float((inner[distance:] == inner[:-distance]).mean()))
    for distance, measured in found.items():
        agree(np.array(measured), same_shard(ROWS, WINDOW, distance), 0.03)
    assert same_shard(ROWS, WINDOW, WINDOW * ROWS) == 0.0


def test_a_batch_and_its_lanes() -> None:
    for lanes in (1, 2):
        found = [shares(windowed(200, ROWS, WINDOW, lanes, 22, epoch), 22).mean() for epoch in range(4)]
        # the ends of an epoch, which the closed form is not of, are a thirtieth of it
        assert np.mean(found) == pytest.approx(same_shard_of_a_batch(ROWS, WINDOW, 22, lanes), rel=0.04)
    assert same_shard_of_a_batch(ROWS, WINDOW, 2, 2) == 0.0


@pytest.mark.parametrize("window", [WINDOW, SHARDS])
def test_the_variance_of_a_mean_is_that_of_sorted_classes(window: int) -> None:
    values = np.random.default_rng(0).normal(size=SHARDS)
    values = (values - values.mean()) / values.std()
    means, pairs = [], []
    for epoch in range(40):
        order = windowed(SHARDS, ROWS, window, 1, 20, epoch)
        pairs.append(shares(order, 20).mean())
        batches = values[order[: len(order) // 20 * 20]].reshape(-1, 20).mean(1)
        means.append(float((batches**2).mean()))
    agree(np.array(means), variance_of_mean(float(np.mean(pairs)), SHARDS, 20), 0.08)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--shards", "40", "--rows", "32", "--batch", "30", "--windows", "4", "40"]
    monkeypatch.setattr(sys, "argv", ["eval.shuffle", *said])
    shuffle.main()
    four, all_of_them = capsys.readouterr().out.splitlines()[-2:]
    measured, closed, buffer = (float(cell.strip(" %")) for cell in four.split("|")[2:5])
    assert closed == pytest.approx(measured, rel=0.15)
    # a row stays in a buffer of 4 shards for 4 on average, in a window of 4 for 2
    assert buffer == pytest.approx(100 / 8, rel=0.2)
    assert all_of_them.split("|")[5].strip() in ("0.9", "1.0", "1.1")
    for flags in (["--batch", "33"], ["--lanes", "7"], ["--windows", "0"], ["--shards", "1"]):
        monkeypatch.setattr(sys, "argv", ["eval.shuffle", *said, *flags])
        with refused(UsageError, flags[0].strip("-") if flags[0] != "--lanes" else "batch"):
            shuffle.main()
    with refused(UsageError, "distance"):
        same_shard(ROWS, WINDOW, 0)
