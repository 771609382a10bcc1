"""eval.speed: the timing is fair, the ratios say what they mean, speed.json has the shape others read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval import speed, speed_data, timing
from ldm_vae.errors import UsageError


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    times = timing.interleave(
        {name: lambda name=name: order.append(name) for name in "AB"}, rounds=2, clock=lambda: float(next(ticks))
    )
    assert order == ["A", "B", "A", "B", "A", "B"]
    assert times == {"A": [1.0, 1.0], "B": [1.0, 1.0]}


def test_a_ratio_above_one_means_faster() -> None:
    times = {"fast": [1.0, 2.0, 1.0], "slow": [2.0, 5.0, 3.0]}
    assert timing.row("fast", times, "fast", "slow", images_per_s=4.0) == {
        "name": "fast",
        "median_s": 1.0,
        "ratio": {"to": "slow", "median": 2.5, "min": 2.0, "max": 3.0},
        "images_per_s": 4.0,
    }
    assert "ratio" not in timing.row("slow", times, "slow", None)


def test_speed_data_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed_data, "SIZES", {"": (96, 64)})
    monkeypatch.setattr(speed_data, "BATCH", 2)
    monkeypatch.setattr(speed_data, "RESOLUTION", 16)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "data", "--output", str(tmp_path / "out"), "--rounds", "2"])
    speed.main()
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["machine"]["torch"]
    rows = {result["name"]: result for result in found["results"]}
    assert rows.keys() == {"plain_pipeline", "data", "data_jpeg_draft", "bare_decode"}
    assert rows["data"]["ratio"]["to"] == "plain_pipeline"
    assert rows["data"]["ratio"]["min"] <= rows["data"]["ratio"]["median"] <= rows["data"]["ratio"]["max"]
    assert rows["data"]["images_per_s"] > 0
    assert "x plain_pipeline" in capsys.readouterr().out


def test_rounds_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.speed", "data", "--output", str(tmp_path), "--rounds", "0"])
    with pytest.raises(UsageError, match="rounds: expected at least 1, got 0"):
        speed.main()
