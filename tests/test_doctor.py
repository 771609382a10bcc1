"""`ldm-vae doctor`: it says what a run would find on this machine, and what to do about what is in the way."""

from __future__ import annotations

import shutil
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import config_args
from repository import ROOT
from sentences import refused

from ldm_vae.cli import call
from ldm_vae.commands import doctor
from ldm_vae.core.errors import WorkError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of one user with a folder of its own, offline and without a config of Accelerate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "accelerate.yaml"))
    return tmp_path


def found() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.findings()}


def test_a_machine_without_fault(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    call("doctor")
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in said and "offline" in said and "1 process" in said
    assert str(elsewhere / "cache" / "ldm-vae") in said and "!" not in said


def test_a_full_disk_and_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 10**9))
    monkeypatch.setattr(doctor.os, "access", lambda folder, _: folder != elsewhere)
    with refused(WorkError, "things to see to"):
        call("doctor")
    said = capsys.readouterr().out
    assert "! here" in said and "it cannot be written; start from another folder" in said
    assert "! hub's cache" in said and "expected 5 GB" in said and "HF_HOME names another one" in said


def test_a_launch_that_would_be_another(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "accelerate.yaml").write_text("num_processes: 4\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = found()["launch"]
    assert "4 processes" in line.found and line.advice is not None and "makes one process of it" in line.advice


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    advice = found()["GPU"].advice
    assert advice is not None and "install one for the CUDA version" in advice


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("datasets", "tifffile") else there(name))
    lines = found()
    assert lines["packages"].advice == "pip install datasets"
    assert "tiff (unusual TIFFs)" in lines["extras"].found and lines["extras"].advice is None


def test_every_extra_is_known() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*doctor.EXTRAS} == {*extras} - {"dev", "docs"}  # which are of those who change this project
    assert all(any(one.startswith(package) for one in extras[name]) for name, (package, _) in doctor.EXTRAS.items())


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("LDM_VAE_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of nobody
    line = found()["hub"]
    assert "does not answer" in line.found and line.advice is None  # a run on local folders needs none
