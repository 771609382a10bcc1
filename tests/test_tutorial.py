"""docs/tutorial.ipynb is its script, cell by cell, and the script runs: on few tiles, for few images."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from fork_server import fork
from images import write_images
from notebook import NOTEBOOK, SCRIPT, Cell, cells_of, execute, notebook_of

from ldm_vae import cli

CELLS = cells_of(SCRIPT.read_text(encoding="utf-8"))
# what makes it short: each stands in the script
SHORTER = {
    "!ldm-vae assets demo photos": "",
    "--max_train_images 480": "--max_train_images 16 --init_images 32 --normalisation_images 8",
    "--validate_every_images 240 --validation_images 16": "--validate_every_images 16 --validation_images 4",
    "--resolution 256": "--resolution 64",
    "None, 256, batch_size=2": "None, 64, batch_size=2",
    "--max_train_images 3200 --sample_every_images 3200 --measure_images 36": (
        "--max_train_images 32 --sample_every_images 32 --sample_images 4 --measure_images 4 --sampling.steps 2"
    ),
}


def shortened(cell: Cell) -> Cell:
    source = cell.source
    for old, new in SHORTER.items():
        source = source.replace(old, new)
    return Cell(cell.kind, source, cell.title)


def forked(command: str) -> str:
    """`ldm-vae ...` in a child that need not import torch."""
    program, *words = shlex.split(command)
    assert program == "ldm-vae"
    done = fork(cli.main, words, {"OMP_NUM_THREADS": "1"}, Path.cwd()).wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_notebook_is_its_script() -> None:
    made = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = made.pop("cells")
    outputs = [cell.get("outputs", []) for cell in cells]
    assert notebook_of(CELLS, outputs) == made | {"cells": cells}
    assert all(output for cell, output in zip(CELLS, outputs, strict=True) if cell.kind == "code")
    pictures = [one for output in outputs for one in output if any("image" in kind for kind in one.get("data", {}))]
    assert len(pictures) == 4 and all(one["metadata"]["alt"] for one in pictures)
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_cells_of_the_percent_format() -> None:
    script = "# %% [markdown]\n# # A\n#\n# b\n\n# %% A title\n# !run it\n\n# %%\nx = 1\nx\n"
    cells = [Cell("markdown", "# A\n\nb"), Cell("code", "!run it", "A title"), Cell("code", "x = 1\nx")]
    assert cells_of(script) == cells
    outputs = execute(cells, lambda command: f"{command}: ran\n")
    assert outputs[1][0]["text"] == ["run it: ran\n"] and outputs[2][0]["data"] == {"text/plain": ["1"]}


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(any(old in cell.source for cell in CELLS) for old in SHORTER)
    for part, count in (("train", 24), ("heldout", 4), ("photographs/heldout", 2), ("photographs/train", 1)):
        write_images(tmp_path / "photos" / part, count, (72, 72))
    monkeypatch.chdir(tmp_path)
    cells = [short for cell in CELLS if (short := shortened(cell)).source]
    outputs = execute(cells, forked)
    assert all(output for cell, output in zip(cells, outputs, strict=True) if cell.kind == "code")
