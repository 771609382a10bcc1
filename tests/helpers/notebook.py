"""Make docs/tutorial.ipynb of docs/tutorial.py, running it: minutes of one core. Where no code has changed, the outputs
that are there are kept.

    OMP_NUM_THREADS=1 python tests/helpers/notebook.py

The script is in jupytext's percent format: `# %%` begins a cell, with a title if it has one, `# %% [markdown]` one of
text, and `# !` a shell command. A value that ends a cell is shown, pictures as PNG or WebP, whichever is smaller.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT, NOTEBOOK = ROOT / "docs" / "tutorial.py", ROOT / "docs" / "tutorial.ipynb"


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook."""

    kind: str
    """markdown or code."""
    source: str
    title: str = ""


def cells_of(script: str) -> list[Cell]:
    """The cells of a script in the percent format."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == "[markdown]":
            found.append(Cell("markdown", "\n".join(line[2:] for line in body.strip().splitlines())))
        else:
            found.append(Cell("code", re.sub(r"^# !", "!", body.strip(), flags=re.MULTILINE), title.strip()))
    return found


def in_shell(command: str) -> str:
    """What a command said. Progress bars are for terminals: of a line that was written over, the last state is kept."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, env=os.environ | {"PATH": path}, text=True, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return "".join(line.rpartition("\r")[2] + "\n" for line in done.stdout.replace("\r\n", "\n").splitlines())


def execute(cells: list[Cell], shell: Callable[[str], str] = in_shell) -> list[list[dict[str, Any]]]:
    """The outputs of each cell, as notebooks have them, run in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_outputs(cell, names, shell) if cell.kind == "code" else [] for cell in cells]


def _outputs(cell: Cell, names: dict[str, Any], shell: Callable[[str], str]) -> list[dict[str, Any]]:
    said = io.StringIO()
    value = None
    if cell.source.startswith("!"):
        said.write(shell(cell.source[1:]))
    else:
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(said):
            exec(compile(tree, str(SCRIPT), "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), str(SCRIPT), "eval"), names)
    found: list[dict[str, Any]] = []
    if said.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)})
    if value is not None:
        data, metadata = _shown(value), {"alt": cell.title} if cell.title else {}
        found.append({"output_type": "display_data", "data": data, "metadata": metadata})
    return found


def _shown(value: Any) -> dict[str, Any]:
    if not hasattr(value, "_repr_png_"):
        return {"text/plain": [repr(value)]}
    files = {}
    for kind, options in {"png": {"optimize": True}, "webp": {"quality": 90, "method": 6}}.items():
        value.save(file := io.BytesIO(), format=kind, **options)
        files[f"image/{kind}"] = file.getvalue()
    kind = min(files, key=lambda one: len(files[one]))
    return {kind: base64.b64encode(files[kind]).decode(), "text/plain": [f"{value.width} x {value.height} px"]}


def notebook_of(cells: list[Cell], outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The notebook, format 4.5."""
    found = []
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True)):
        entry = {
            "cell_type": cell.kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": cell.source.splitlines(keepends=True),
        }
        if cell.kind == "code":
            entry |= {"execution_count": None, "outputs": output}
        found.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    cells = cells_of(SCRIPT.read_text(encoding="utf-8"))
    there = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if NOTEBOOK.exists() else []
    outputs = [cell.get("outputs", []) for cell in there]
    code = [cell.source for cell in cells if cell.kind == "code"]
    if code != ["".join(cell["source"]) for cell in there if cell["cell_type"] == "code"] or len(there) != len(cells):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            outputs = execute(cells)
    made = notebook_of(cells, outputs)
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
