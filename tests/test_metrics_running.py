"""Streaming sums: exact whatever the division into batches, with the interval of a textbook."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_vae.core.intervals import t95
from ldm_vae.metrics.running import Running


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60), st.integers(1, 20))
def test_any_division_into_batches_gives_numpy_mean_and_deviation(values: list[float], batch: int) -> None:
    running = Running()
    for start in range(0, len(values), batch):
        running.update(torch.tensor(values[start : start + batch], dtype=torch.float64))
    summary = running.summary()
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert summary.std == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(30, 4, 12)
    running = Running()
    running.update(torch.from_numpy(values))
    expected = scipy.stats.t.interval(0.95, 11, np.mean(values), scipy.stats.sem(values))
    assert running.summary().ci95 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 2.5, 3, 3.5, 4, 5, 8, 15, 40, 10_000])
def test_quantile_of_students_t(freedom: float) -> None:
    assert t95(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=5e-3)


def test_few_images_promise_no_interval() -> None:
    running = Running()
    assert running.summary().to_json() == {"mean": None, "ci95": None, "n": 0, "note": "no images"}
    running.update(torch.tensor([3.0]))
    assert running.summary().to_json() == {"mean": 3.0, "ci95": None, "n": 1}
