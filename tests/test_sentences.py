"""The golden sentences: a changed one is red, a rewritten one green, and what varies from run to run is masked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT
from sentences import masked, names, refused

SUITE = """
import pytest
from sentences import refused

@pytest.mark.parametrize("field", ["rank", "seed"])
def test_fields(field, tmp_path):
    with refused(ValueError, field):
        raise ValueError(f"{field}: WORDS in {tmp_path}/x")

def test_without():
    pass
"""


def write(folder: Path, words: str) -> Path:
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "conftest.py").write_text('pytest_plugins = ["sentences"]\n')
    (folder / "tests" / "test_it.py").write_text(SUITE.replace("WORDS", words))
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT / 'tests' / 'helpers'}\n")
    return folder


def run(folder: Path, *options: str) -> str:
    """The output of pytest there, green or red."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist.plugin", *options, "tests"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # most of a second's imports
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment).stdout


@pytest.mark.slow
def test_a_changed_sentence_is_red_until_it_is_rewritten(tmp_path: Path) -> None:
    folder, golden = write(tmp_path, "old words"), tmp_path / "tests" / "sentences.json"
    assert "2 failed, 1 passed" in run(folder)
    assert "3 passed" in run(folder, "--write-sentences", "-n", "2") and "3 passed" in run(folder)
    first = golden.read_text(encoding="utf-8")
    assert json.loads(first) == {
        f"tests/test_it.py::test_fields[{field}]": [f"{field}: old words in TMP/x"] for field in ("rank", "seed")
    }
    red = run(write(folder, "new words"))
    assert "2 failed, 1 passed" in red and "--write-sentences" in red
    assert "rank: old words in TMP/x" in red and "rank: new words in TMP/x" in red
    run(folder, "--write-sentences", "-k", "rank")  # those of tests that did not run stay
    assert golden.read_text(encoding="utf-8") == first.replace("rank: old", "rank: new")


@pytest.mark.slow
def test_a_sentence_that_is_no_longer_said_is_red(tmp_path: Path) -> None:
    folder = write(tmp_path, "words")
    (folder / "tests" / "sentences.json").write_text('{"tests/test_it.py::test_without": ["seed: words"]}')
    assert "3 failed" in run(folder)
    run(folder, "--write-sentences")
    assert "test_without" not in (folder / "tests" / "sentences.json").read_text(encoding="utf-8")


def test_the_field_is_a_whole_word_of_the_sentence() -> None:
    for sentence in ("vae: no such folder", "--vae: no such folder", "`data.vae` is 3", "give a vae"):
        assert names(sentence, "vae"), sentence
    for sentence in ("run ldm-vae", "vae_folder: no", "vae-1: no", "vaes: no"):
        assert not names(sentence, "vae"), sentence
    with pytest.raises(AssertionError), refused(ValueError, "seed"):
        raise ValueError("rank: expected 0 to 1, got 2")


def test_masks_hide_what_varies_and_nothing_else() -> None:
    base, root = Path("/tmp/pytest-of-me/pytest-3/popen-gw0"), Path("/home/me/project")
    for sentence, expected in {
        f"{base}/test_a_b_12/store/shards: absent": "TMP/store/shards: absent",
        f"`{base}/clip0`, {base}/test_1": "`TMP`, TMP",
        f"{root}/configs/smoke.yaml: {root}": "ROOT/configs/smoke.yaml: ROOT",
        "http://127.0.0.1:45678/me/vae": "http://127.0.0.1:PORT/me/vae",
        f"encoder is {'0a' * 6}..., not {'0a' * 32}": "encoder is HEX..., not HEX",
        "torch 2.6.0+cpu": "torch VERSION",
        "loss 0.12345678 at 1.5e-05": "loss FLOAT at 1.5e-05",
        "max_bad 0.02: 3 of 100 are bad, in 00000000.safetensors": None,
    }.items():
        assert masked(sentence, base, root) == (expected or sentence)
