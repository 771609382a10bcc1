"""eval.speed: the timing is fair, the ratios say what they mean, speed.json has the shape others read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from eval import speed, speed_data, speed_encode, speed_read, timing
from eval.synthetic_store import write_empty, write_synthetic
from ldm_vae import LatentDataset
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


# --- encode -----------------------------------------------------------------------------------------------------------


def test_speed_encode_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_encode, "RESOLUTION", 32)
    monkeypatch.setattr(speed_encode, "WAITING_IMAGES", 64)
    for name, value in {"BATCH": 4, "PHOTOGRAPHS": 8, "SCRIPT_IMAGES": 8, "SIZE": (96, 64)}.items():
        monkeypatch.setattr(speed_encode, name, value)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "encode", "--output", str(tmp_path / "out"), "--rounds", "1"])
    speed.main()
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["results"]
    named = [(row["name"], row.get("ratio", {}).get("to")) for row in rows]
    assert named == [
        ("bare_encoder", None),
        ("encode", "bare_encoder"),
        ("waiting_encoder", None),
        ("usual_script", None),
        ("encode_waiting", "waiting_encoder"),
        ("encode_waiting", "usual_script"),
    ]
    waiting, script = rows[2]["images_per_s"], rows[3]["images_per_s"]
    assert script < waiting  # the script waits as long for the encoder, and works besides


# --- read -------------------------------------------------------------------------------------------------------------


def test_a_synthetic_store_is_a_store(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "store", 70, shape=(4, 8, 8), unit=32)
    data = LatentDataset(tmp_path / "store", raw="mean", columns=("key",))
    batch = data.__getitems__([69, -1, 0, 33])
    assert batch[0]["mean"].dtype == torch.float16 and torch.equal(batch[0]["mean"], batch[1]["mean"])
    assert [item["key"] for item in batch] == ["00000069", "00000069", "00000000", "00000033"]
    assert torch.equal(LatentDataset(tmp_path / "store", raw=True)[33]["mean"], batch[3]["mean"].float())
    assert "logvar" not in batch[0]
    with pytest.raises(IndexError, match="index 70 of a store of 70"):
        data.__getitems__([0, 70])
    with pytest.raises(UsageError, match="raw: the store has no 'sample'"):
        LatentDataset(tmp_path / "store", raw="sample")


def test_opening_ten_million_samples_takes_little_memory(tmp_path: Path) -> None:
    write_empty(tmp_path / "large", 10_000_000)
    _, grown = speed_read.open_store(tmp_path / "large")
    assert grown < 300e6
    # nothing per sample: the index of the shards is all there is
    data = LatentDataset(tmp_path / "large")
    assert sum(value.nbytes for value in (data._stops, data._starts)) == 2 * 8 * len(data.shards)
    assert data.shape(9_999_999) == (4, 32, 32) and not len(data._maps)


def test_a_store_that_grows_is_read_beside_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_read, "GROWTH", (10, 100))
    monkeypatch.setattr(speed_read, "STEPS", 2)
    rows = speed_read._growing(tmp_path, 1)
    assert [(row["name"], row.get("ratio", {}).get("to")) for row in rows] == [
        ("index_select_1e1", None),
        ("read_raw_1e1", "index_select_1e1"),
        ("index_select_1e2", None),
        ("read_raw_1e2", "index_select_1e2"),
    ]
    assert rows[1]["images_per_s"] > 0
