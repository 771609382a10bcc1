"""Modules of a user's own, as docs/extending.md shows them: found from the current folder, in training and in verbs."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from images import write_images
from repository import ROOT
from sentences import refused
from training_runs import TINY

from ldm_vae.core.config import import_own
from ldm_vae.core.errors import UsageError
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.preparation import plain
from ldm_vae.latent_store import read_manifest
from ldm_vae.metrics.select import build_metrics


def write_modules(folder: Path) -> list[str]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", text, re.DOTALL)
    for name, code in blocks:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return [name for name, _ in blocks]


def call(folder: Path, *words: object) -> str:
    # -P: the current folder is not on the path by the way of starting it
    command = [sys.executable, "-P", "-m", "ldm_vae", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_modules_of_the_current_folder_serve_in_every_verb(tmp_path: Path) -> None:
    assert len(write_modules(tmp_path)) == 6
    write_images(tmp_path / "scans", 6)
    (tmp_path / "scans" / "notes.jpg").write_text("no scan")
    settings = TINY | {
        "output_dir": "run",
        "data": {"kind": "my_lab.scans", "path": "scans", "pattern": "*.png"},
        "model": TINY["model"] | {"kind": "my_lab.grey"},  # type: ignore[operator]
        "losses": {"l1": {}, "edges": {"kind": "my_lab.edges", "weight": 0.1}},
        "discriminator": {"kind": "my_lab.critic", "width": 8},
        "perturbations": {"shrink": {"kind": "my_lab.shrink"}},
        "max_train_images": 32,
        "dataloader_num_workers": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    call(tmp_path, "train", "config.yaml")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/edges" in line for line in lines)
    own = ("--kind", "my_lab.scans", "--data.pattern", "*.png")
    assert "6 images" in call(tmp_path, "inspect", "scans", *own)
    call(tmp_path, "export", "run", "vae", "--stats", "scans", *own)
    call(tmp_path, "encode", "vae", "scans", "store", "--resolution", 32, *own)
    assert read_manifest(tmp_path / "store").samples == 6
    call(tmp_path, "store", "verify", "store", "--reencode", 2, "--data", "scans", *own)
    metrics = ("--metrics", "psnr,my_lab.sharpness", "--resolution", 32, "--output", "measured")
    call(tmp_path, "evaluate", "vae", "scans", *own, *metrics)
    found = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert found["data"]["images"] == 6 and found["metrics"]["my_lab.sharpness"]["better"] == "higher"
    assert "sharpness ↑" in (tmp_path / "measured" / "metrics.md").read_text()
    call(tmp_path, "report", "measured")
    assert "sharpness" in (tmp_path / "measured" / "index.html").read_text()


def test_a_folder_stands_in_for_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "yaml.tokens", raising=False)
    assert import_own("mine").__file__ == str(tmp_path / "mine.py")
    assert import_own("yaml.tokens").__file__ != str(tmp_path / "yaml" / "tokens.py")


@pytest.mark.parametrize(
    "body", ["", "def build(): return 3", "raise RuntimeError('no')", "import sys; sys.exit()", "build = None", "("]
)
def test_a_module_without_a_metric_is_one_sentence(body: str, module: Callable[[str], str]) -> None:
    path = module(body)
    with pytest.raises(UsageError, match=f"metrics: {path}") as refusal:  # and Python's words, so not golden
        build_metrics([path], torch.device("cpu"), 32)
    assert "\n" not in str(refusal.value)


def test_a_source_that_decodes_otherwise_than_the_network_takes_images_is_refused(module: Callable[[str], str]) -> None:
    path = module(
        "from ldm_vae.core.config import Part\nfrom ldm_vae.data.decoding import Decoding\n"
        "class Grey:\n    decoding = Decoding(channels=1)\n"
        "class Config(Part):\n    path: str\n    channels: int = 3\n    def build(self): return Grey()\n"
    )
    with refused(UsageError, "decoding"):
        plain(DataFlags(kind=path)).open("x")
    assert plain(DataFlags(kind=path, channels=1)).open("x").decoding.channels == 1


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the current folder, and gives its dotted path."""

    def write(body: str) -> str:
        name = f"lab_{secrets.token_hex(4)}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(body)
        return f"{name}.own"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return write
