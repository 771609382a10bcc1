"""A term from outside the repository: the README's example, in a user's package, through the training program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from images import write_images
from repository import ROOT
from sentences import refused
from training_runs import metrics, run, write_config

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.training.config import Training


def readme_term() -> str:
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "TermConfig" in block
    ]  # fmt: skip
    return code


def test_the_readmes_loss_trains_from_a_users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").touch()
    (tmp_path / "my_lab" / "tv.py").write_text(readme_term())
    monkeypatch.syspath_prepend(str(tmp_path))
    images = write_images(tmp_path / "images", 4)
    losses = {"l1": {}, "smooth": {"kind": "my_lab.tv", "weight": 0.01, "schedule": {"images": 16}}}
    changes = {"losses": losses, "adversary": {"weight": 0.0}, "max_train_images": 16}
    done = run(write_config(tmp_path, images, **changes))
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert all(line["loss/smooth"] > 0 for line in lines) and lines[0]["weight/smooth"] < lines[1]["weight/smooth"]
    last = lines[-1]
    expected = last["loss/l1"] + last["weight/smooth"] * last["loss/smooth"]
    assert last["loss/total"] == pytest.approx(expected, rel=2e-2)  # means over an interval in which the weight rises
    assert load_autoencoder(tmp_path / "run").config.latent_channels == 4
    assert "kind: my_lab.tv" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_copied_file_of_the_librarys_says_what_to_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_lab").mkdir()
    (tmp_path / "their_lab" / "mine.py").write_text((ROOT / "ldm_vae" / "losses" / "l1.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_config(tmp_path, tmp_path, losses={"mine": {"kind": "their_lab.mine"}})
    with refused(UsageError, "losses.mine"):
        config.load(Training, path)
