"""Break each property of tests/mutations.md in a copy of the tree and see its test go red.

python tests/mutations.py [WORD]      # WORD: only the rows that hold it; that file describes its columns

Each test runs in a child of this process, which has imported the large packages and nothing of ours: seconds a row.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(?:def|class) ([\w.]+)(?:: (.+))?")
WORD = re.compile(r"\w+")
TOKEN = re.compile(r"\w+|[^\w\s]")
CELL = re.compile(r"`((?:[^`])+)`")
# packages that are imported already cannot have their assertions rewritten: pytest warns, and warnings are errors
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
FAILED = 1  # pytest's status when tests ran and failed: a mutation that cannot be imported is no evidence


def rows() -> list[tuple[str, str, str, str]]:
    """(file, old text, new text, test) of each line of the table."""
    lines = (ROOT / "tests" / "mutations.md").read_text(encoding="utf-8").splitlines()
    found = [tuple(CELL.findall(line)) for line in lines if line.startswith("| `")]
    assert all(len(row) == 4 for row in found), "each row holds four pieces of code"
    return found  # type: ignore[return-value]


def mutated(source: str, old: str, new: str) -> str | None:
    """The file's text with the mutation; None when it has no such place."""
    lines = source.splitlines(keepends=True)
    first, last, piece = 0, len(lines), old
    if named := PLACE.fullmatch(old):
        name, piece = named.groups()
        if (node := definition(parsed(source), name.split("."))) is None:
            return None
        first = (node if piece else node.body[0]).lineno - 1
        last = node.end_lineno or last
        if piece is None:
            return "".join([*lines[:first], f"{' ' * node.body[0].col_offset}{new}\n", *lines[last:]])
    text = "".join(lines[first:last])
    changed, count = layout(piece).subn(lambda _: new, text, count=1)
    return "".join([*lines[:first], changed, *lines[last:]]) if count else None


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def layout(piece: str) -> re.Pattern[str]:
    """The piece however a formatter lays it out: with any space between its tokens, and a comma before a bracket that
    closes."""
    words = TOKEN.findall(piece)
    found = re.escape(words[0])
    for before, word in pairwise(words):
        space = r"\s+" if WORD.match(before) and WORD.match(word) else r"\s*"
        found += space + (r"(?:,\s*)?" if word in ")]}" else "") + re.escape(word)
    return re.compile(found)


def definition(tree: ast.AST, names: Sequence[str]) -> ast.ClassDef | ast.FunctionDef | None:
    """The class, the function `Class.method`, or a function within one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == names[0]:
            return definition(node, names[1:]) if len(names) > 1 else node
    return None


def copy_tree(to: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def import_packages() -> None:
    """What every test imports. Nothing is computed here: a child of a process whose threads run dies in its first
    backward."""
    for name in ("torch", "torchvision", "diffusers", "accelerate", "datasets", "lpips", "pydantic", "tyro"):
        importlib.import_module(name)
    for name in ("AutoencoderKL", "AutoencoderTiny", "VQModel"):  # imported when they are asked for
        getattr(sys.modules["diffusers"], name)


def status_of(test: str, tree: Path) -> int:
    """pytest's exit status for a test of the tree."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True  # compiled files are told apart by the second
        sys.path[0] = str(tree)  # in the place of tests/, where the real ones are
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit(int(pytest.main([*OPTIONS, f"tests/{test}"])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [row for row in rows() if any(word in cell for cell in row)]
    green = []
    import_packages()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for file, old, new, test in chosen:
            path = tree / file
            before = path.read_text(encoding="utf-8")
            if (broken := mutated(before, old, new)) is None:
                green.append(f"{file}: does not hold `{old}`")
                continue
            path.write_text(broken, encoding="utf-8")
            red = status_of(test, tree) == FAILED
            path.write_text(before, encoding="utf-8")
            print(f"{'red  ' if red else 'GREEN'} {file}: {old} => {new} ({test})", flush=True)
            if not red:
                green.append(f"{file}: {old}")
    print(f"{len(chosen)} mutations, {len(green)} not seen" + "".join(f"\n  {line}" for line in green))
    sys.exit(bool(green))


if __name__ == "__main__":
    main()
