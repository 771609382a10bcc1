"""eval.speed gpu_fast and its kin, roofline, and eval.chip, on small networks of a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from sentences import refused

from eval import chip
from eval.speed import __main__ as speed
from eval.speed import denoisers, encoders, fast, roofline
from eval.speed.peaks import Peaks
from eval.speed.recipes import Networks, Workload
from eval.speed.roofline import (
    Ledger,
    kind_of,
    profiled,
)
from ldm_vae.core.errors import UsageError
from ldm_vae.denoisers.dit import Config as DiTConfig

SMALL = Workload(widths=(8, 16), resolution=32, net="alex", critic_width=8, groups=4)
BEST = Peaks({torch.float32: 1e12, torch.bfloat16: 4e12}, 1e9)
CPU_STAGES = {name: changes for name, changes in fast.STAGES.items() if "graph" not in changes}


@pytest.mark.slow
def test_every_change_leaves_the_step_a_step() -> None:
    rows = fast.rows("gpu", {name: lambda c=c: fast.begin(SMALL, c) for name, c in CPU_STAGES.items()}, 2, 1)
    assert [row["name"] for row in rows] == [f"gpu_{name}" for name in CPU_STAGES]
    assert rows[-1]["ratio"]["to"] == "step" and rows[-1]["images_per_s"] > 0


def test_a_contender_that_cannot_run_is_a_row_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> fast.Begun:
        raise RuntimeError("out\nof it")

    begun = fast.Begun(lambda: None)
    rows = fast.rows("gpu", {"step": lambda: begun, "broken": broken, "other": lambda: begun}, 2, 1)
    assert [row["name"] for row in rows] == ["gpu_broken", "gpu_step", "gpu_other"]
    assert rows[0]["failed"] == "RuntimeError: out of it"
    assert "Traceback" in capsys.readouterr().err and "failed: RuntimeError" in speed.table(rows)


def test_changes_compose() -> None:
    networks = Networks(SMALL)
    for name in ("fused_norm", "lpips_bf16", "critic_channels_last", "adam_fused"):
        fast.CHANGES[name](networks)
    assert networks.lpips.network.net.slice1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert networks.optimizer.param_groups[0]["fused"]
    assert any(isinstance(module, fast.FusedResnetBlock) for module in networks.network.modules())


def test_the_encoder_is_compared_with_fp32() -> None:
    rows = encoders.encoders(SMALL, 2, 1, {"encoder": (), "encoder_fused_norm": ("fused_norm",)})
    assert rows[0]["difference"] == 0 and 0 < rows[1]["difference"] < 1e-5


def test_the_gradient_of_lpips_in_half_precision() -> None:
    plain, half = fast.lpips_gradient(SMALL)
    assert plain["value"] < 1e-5 < half["value"] < 0.3


def test_the_denoisers_operations_are_counted_once() -> None:
    shape = DiTConfig(num_layers=1, num_attention_heads=1)
    (row,) = denoisers.denoisers(SMALL, shape, 2, (4, 8, 8), 1e12, 1, {"step": ()})
    (twice,) = denoisers.denoisers(SMALL, shape, 4, (4, 8, 8), 1e12, 1, {"step": ()})
    assert twice["mfu"] * twice["median_s"] == pytest.approx(2 * row["mfu"] * row["median_s"], rel=0.02)


# --- roofline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::convolution_backward", "convolution"),
        ("aten::native_group_norm", "norm"),
        ("ldm_vae::group_norm_silu_backward", "fused norm and SiLU"),
        ("aten::silu_", "SiLU"),
        ("aten::_scaled_dot_product_flash_attention_backward", "attention"),
        ("aten::addmm", "matrix product"),
        ("aten::_to_copy", "copy"),
        ("aten::_fused_adam_.tensor_lr", "optimiser"),
        ("aten::add.Tensor", None),
    ],
)
def test_operations_have_a_kind(operation: str, kind: str | None) -> None:
    assert kind_of(operation) == kind


def test_the_ledger_counts_operations_and_bytes() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    with Ledger(BEST) as ledger:
        c = (a @ b).T.relu()
        c += 1
    assert ledger.flop == {"matrix product": 2 * 64 * 32 * 16, roofline.OTHER: 0}
    assert ledger.bytes["matrix product"] == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert ledger.bytes[roofline.OTHER] == 4 * (2 + 2) * 64 * 16  # a view is free, in place is read and written
    assert ledger.floor["matrix product"] == pytest.approx(ledger.bytes["matrix product"] / 1e9)


def test_the_floor_of_an_operation_is_the_larger_of_two() -> None:
    assert BEST.seconds(1e12, 1, torch.float32) == 1 and BEST.seconds(1e12, 1, torch.bfloat16) == 0.25
    assert BEST.seconds(1, 1e9, torch.float32) == 1


def test_the_profile_has_the_time_of_every_kind() -> None:
    image, weight = torch.randn(2, 8, 64, 64), torch.randn(8, 8, 3, 3)
    seconds = profiled(
        lambda: torch.nn.functional.silu(torch.nn.functional.conv2d(image, weight, torch.ones(8))), "cpu"
    )
    assert seconds["convolution"] > 0 and seconds["SiLU"] > 0


@pytest.mark.slow
def test_the_roofline_of_a_small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "WORK", SMALL)
    monkeypatch.setattr(roofline, "peaks", lambda device: BEST)
    rows = roofline.run(argparse.Namespace(rounds=1))
    whole = {row["name"]: row for row in rows if row["name"].endswith(": all")}
    assert len(whole) == 2 * 8
    assert whole["plain step: all"]["flop"] > whole["plain autoencoder: all"]["flop"] > 0
    fused = {row["name"]: row for row in rows}["fast autoencoder: fused norm and SiLU"]
    assert fused["bytes"] > 0 and "attained" in speed.table(rows)


# --- chip -------------------------------------------------------------------------------------------------------------


def test_parts_are_processes_with_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = {
        "good": "print('fine')",
        "bad": "raise SystemExit(3)",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
    }
    files = {name: tmp_path / f"{name}.py" for name in programs}
    for name, text in programs.items():
        files[name].write_text(text)
    parts = {name: (1 if name == "slow" else 60, ("-m", name)) for name in programs}
    monkeypatch.setattr(chip, "PARTS", parts)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(chip, "SHORTEST", 0)
    monkeypatch.setattr(sys, "argv", ["eval.chip", "--output", str(tmp_path / "out"), "--only", "slow", "bad", "good"])
    chip.main()
    found = json.loads((tmp_path / "out" / "chip.json").read_text())["parts"]
    assert [found[name]["status"] for name in ("slow", "bad", "good")] == [None, 3, 0]
    log = (tmp_path / "out" / "chip.log").read_text()
    assert "begun" in log and "fine" in log


def test_every_part_is_a_benchmark_or_names_tests_that_exist() -> None:
    for name, (seconds, arguments) in chip.PARTS.items():
        files = [ROOT / argument for argument in arguments if argument.endswith(".py")]
        assert seconds > 0 and all(file.is_file() for file in files)
        assert files or name in speed.BENCHMARKS


def test_benchmarks_of_a_gpu_say_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run in (fast.training, fast.regions, fast.batches, encoders.encoder, denoisers.denoiser):
        with refused(UsageError, "gpu"):
            run(argparse.Namespace(rounds=1))
