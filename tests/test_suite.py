"""The suite about itself: every test can fail, nothing is skipped that should run, every mutation has its place."""

from __future__ import annotations

import ast
import functools
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from repository import ROOT

from tests.mutations import mutated, rows

TESTS = sorted((ROOT / "tests").glob("test_*.py"))
HELPERS = sorted((ROOT / "tests" / "helpers").glob("*.py"))


@functools.cache
def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def can_fail(function: ast.FunctionDef, known: dict[str, ast.FunctionDef], depth: int = 3) -> bool:
    """Whether a function asserts, or expects an error, or calls one of ours that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            if not isinstance(node.test, ast.Constant):
                return True
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("raises", "warns") or name.startswith("assert"):
                return True
            if depth and name in known and known[name] is not function and can_fail(known[name], known, depth - 1):
                return True
    return False


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*(ROOT / "tests").glob("*.py"), *HELPERS]}


def test_every_test_has_an_assertion_that_can_fail(trees: dict[Path, ast.Module]) -> None:
    everywhere = {name: node for tree in trees.values() for name, node in functions(tree).items()}
    idle = [
        f"{path.name}::{name}"
        for path in TESTS
        for here in [functions(trees[path])]
        for known in [everywhere | here]
        for name, node in here.items()
        if name.startswith("test_") and not can_fail(node, known)
    ]
    assert idle == []


def test_the_check_sees_an_idle_test() -> None:
    found = functions(ast.parse("def idle():\n    f()\n    assert True\ndef sound():\n    h()\ndef h():\n    assert x"))
    assert not can_fail(found["idle"], found) and can_fail(found["sound"], found)


def imported(tree: ast.Module) -> set[str]:
    """The modules that a file imports, and the names that it imports from them, each without its packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.name for name in node.names} | {getattr(node, "module", None) or ""}
    return {name.rpartition(".")[2] for name in found}


def test_no_file_imports_a_test_file(trees: dict[Path, ast.Module]) -> None:
    """Shared code lies in helpers/: a test file is read, changed and deleted alone."""
    tests = {path.stem for path in TESTS} | {"conftest"}
    assert {path.name: both for path, tree in trees.items() if (both := imported(tree) & tests)} == {}
    for line in ("import test_suite as x", "from test_suite import f", "from tests import test_suite"):
        assert imported(ast.parse(line)) & tests


def test_every_helper_says_what_it_is(trees: dict[Path, ast.Module]) -> None:
    assert [path.name for path in HELPERS if not ast.get_docstring(trees[path])] == []


# what a machine may lack, by file; nothing else is a reason to leave a test out, and to expect a failure is none either
LACKING = {
    "test_assets.py": "the LPIPS weights, where there is no network to fetch them",
    "test_losses_lpips.py": "the same",
    "test_model_kinds.py": "the same",
    "test_data_decoding.py": "a Pillow that writes AVIF",
    "test_report_browser.py": "a browser",
    "test_gpu.py": "a GPU",
}


def test_nothing_is_skipped_that_hides_a_gap(trees: dict[Path, ast.Module]) -> None:
    found = {
        path.name: node.attr
        for path in TESTS
        for node in ast.walk(trees[path])
        if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail", "importorskip")
    }
    assert "xfail" not in found.values() and found.keys() <= LACKING.keys(), found


# who sleeps, by file: a test waits for a condition (`kills.wait_until`), and not for a time
SLEEPING = {
    "test_assets.py": "a download that is still under way when others ask for the same",
    "test_data_loaders.py": "a read that hangs, and between two looks at the condition",
    "test_ownership.py": "between two looks at the condition",
    "test_faults.py": "until a signal comes",
    "test_ray_engine.py": "between two looks at the condition",
    "test_store_remote.py": "between two looks at the condition",
    "test_store_windows.py": "a read that takes its time",
}


def hasty(tree: ast.Module) -> list[int]:
    """Lines with a limit below a minute: a busy machine takes longer to import torch."""
    given = [
        (node.lineno, value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for value in [
            *(word.value for word in node.keywords if word.arg == "timeout"),
            *(node.args[:1] if isinstance(node.func, ast.Attribute) and node.func.attr in ("wait", "join") else ()),
        ]
    ]
    return [line for line, value in given if isinstance(value, ast.Constant) and float(value.value or 60) < 60]


def test_nothing_waits_for_a_time_or_is_impatient(trees: dict[Path, ast.Module]) -> None:
    asleep = {
        path.name
        for path in TESTS
        for node in ast.walk(trees[path])
        if isinstance(node, ast.Attribute) and node.attr == "sleep"
    }
    assert asleep <= SLEEPING.keys()
    assert {path.name: lines for path in TESTS if (lines := hasty(trees[path]))} == {}
    assert hasty(ast.parse("f(timeout=5)\nx.wait(3)\ng(timeout=60)\nx.wait()")) == [1, 2]


def test_what_ran_before_changes_nothing(request: pytest.FixtureRequest) -> None:
    assert torch.initial_seed() == zlib.crc32(request.node.nodeid.encode())
    assert settings().deadline is None and settings().derandomize


def test_every_mutation_has_its_place_and_its_test(trees: dict[Path, ast.Module]) -> None:
    """That each goes red is `python tests/mutations.py`, in hours; that none has gone stale is seen here."""
    listed = rows()
    assert len(listed) > 50
    for file, old, new, test in listed:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert mutated(text, old, new) not in (None, text), f"{file} does not hold `{old}`"
        assert old != new
        where, _, name = test.partition("::")
        assert not name or name in functions(trees[ROOT / "tests" / where]), test
    assert len({(file, old, new) for file, old, new, _ in listed}) == len(listed)


def test_a_mutation_finds_its_place_however_it_is_laid_out() -> None:
    source = (
        "def f(): return g(a)\nclass A:\n    b = 1\n    def f(self):\n        return g(\n            a,\n        )\n"
    )
    assert mutated(source, "def A.f: g(a)", "0") == source.replace("g(\n            a,\n        )", "0")
    assert mutated(source, "def f: g(a)", "0") == mutated(source, "g(a)", "0") == source.replace("g(a)", "0")
    assert mutated(source, "class A: b=1", "b = 2") == source.replace("b = 1", "b = 2")
    assert mutated(source, "def A.f", "pass").endswith("def f(self):\n        pass\n")
    for absent in (
        "def A.f: ga",
        "def A.f: def f(self): returng(a)",
        "def A.g: g(a)",
        "class B: b = 1",
        "def A.f: g(b)",
    ):
        assert mutated(source, absent, "0") is None


def test_every_golden_sentence_belongs_to_a_test(trees: dict[Path, ast.Module]) -> None:
    golden = json.loads((ROOT / "tests" / "sentences.json").read_text(encoding="utf-8"))
    found = {test: re.fullmatch(r"(tests/\w+\.py)::(\w+)(\[.*\])?", test, re.DOTALL) for test in golden}
    assert golden
    assert [
        test
        for test, place in found.items()
        if not place or ROOT / place[1] not in trees or place[2] not in functions(trees[ROOT / place[1]])
    ] == []


def test_imports_in_strings_and_documents_are_of_names_that_exist() -> None:
    """Programs in strings and in pages are seen by no linter, and run in subprocesses or never."""
    told = re.compile(r"from (ldm_vae(?:\.\w+)*) import ([\w, ]+)")
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    found = {
        (module, name.split()[0])
        for path in [*pages, *TESTS, *(ROOT / "ldm_vae").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
        for module, names in told.findall(path.read_text(encoding="utf-8"))
        for name in names.split(",")
        if name.strip()
    }
    assert len(found) > 500
    absent = []
    for module, name in sorted(found):
        place = ROOT / module.replace(".", "/")
        file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        member = (place / name).is_dir() or (place / f"{name}.py").is_file()
        if not (member or re.search(rf"\b{name}\b", text)):
            absent.append(f"{module}: {name}")
    assert absent == []
