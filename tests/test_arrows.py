"""Imports: in one direction, without circles between files or packages, and what starts fast stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from scipy.sparse.csgraph import connected_components

LIBRARY = sorted((ROOT / "ldm_vae").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "train").rglob("*.py"), *(ROOT / "eval").rglob("*.py")])


def imports(text: str) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module}{'.' if node.module else ''}{alias.name}" for alias in node.names}
    return found


def wrong_in_library(name: str, text: str) -> list[str]:
    found = imports(text)
    # a relative import hides its target from the checks below
    bad = [module for module in found if module.split(".")[0] in ("train", "eval", "tests", "")]
    if name.startswith("core/"):  # the base: below everything
        bad += [module for module in found if module.startswith("ldm_vae.") and not module.startswith("ldm_vae.core")]
    if name.startswith(("losses/", "quantizers/", "perturbations/", "discriminators/", "priors/")):
        package = f"ldm_vae.{name.split('/')[0]}."
        siblings = {path.stem for path in (ROOT / "ldm_vae" / name).parent.glob("*.py")} - {"__init__"}
        bad += [module for module in found if module.startswith(package) and module.split(".")[2] in siblings]
    if name.split("/")[0] in ("data", "losses", "latent_store", "metrics", "export"):
        bad += [
            module
            for module in found
            if module.startswith(("ldm_vae.commands", "ldm_vae.cli", "ldm_vae.training.config"))
        ]
    return sorted(bad)


def test_the_library_imports_no_program_and_siblings_stay_apart() -> None:
    wrong = {str(path): bad for path in LIBRARY
             if (bad := wrong_in_library(path.relative_to(ROOT / "ldm_vae").as_posix(), path.read_text()))}  # fmt: skip
    assert wrong == {}


def test_the_check_sees_what_it_forbids() -> None:
    assert wrong_in_library("losses/new.py", "from ldm_vae.losses.l1 import L1") != []
    assert wrong_in_library("losses/new.py", "from ldm_vae.losses import TermConfig") == []
    assert wrong_in_library("losses/new.py", "from .l1 import L1") != []
    assert wrong_in_library("core/config.py", "from ldm_vae.training.step import TrainingStep") != []
    assert wrong_in_library("core/config.py", "from ldm_vae.core.errors import UsageError") == []
    assert wrong_in_library("step.py", "def f():\n    from train import autoencoder") != []


Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(sources: Mapping[str, str]) -> Graph:
    """Module => modules among `sources` (text by dotted name) that it imports, inside functions too; `from a import b`
    is an import of a.b where that is a module. What is imported for a type checker alone is never imported."""
    graph: Graph = {module: set() for module in sources}
    for module, text in sources.items():
        tree = ast.parse(text)
        checked = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        typed = {id(one) for node in checked if ast.unparse(node.test) == "TYPE_CHECKING" for one in ast.walk(node)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                base = str(node.module)
                names = [f"{base}.{name}" if f"{base}.{name}" in sources else base for name in names]
            if id(node) not in typed:
                graph[module] |= {name for name in names if name in sources} - {module}
    return graph


def level(graph: Graph, package: str) -> Graph:
    """The same between the direct members, modules or packages, of a package."""
    depth = package.count(".") + 2

    def member(module: str) -> str:
        return ".".join(module.split(".")[:depth])

    found: Graph = {}
    for module, imported in graph.items():
        if module.startswith(f"{package}."):
            inside = {member(one) for one in imported if one.startswith(f"{package}.")}
            found.setdefault(member(module), set()).update(inside - {member(module)})
    return found


def circles(graph: Graph) -> list[str]:
    """The edges within strongly connected components of more than one member."""
    names = sorted(graph)
    matrix = np.array([[other in graph[name] for other in names] for name in names])
    _, component = connected_components(matrix, connection="strong")
    of = dict(zip(names, component.tolist(), strict=True))
    return [f"{one} -> {other}" for one in names for other in sorted(graph[one]) if of[one] == of.get(other)]


def test_no_files_and_no_packages_import_each_other_in_a_circle() -> None:
    graph = import_graph({name_of(path): path.read_text() for path in LIBRARY})
    assert circles(graph) == []
    for package in sorted({name_of(path.parent / "__init__.py") for path in LIBRARY}):
        assert circles(level(graph, package)) == [], package


def test_rooms_stay_small() -> None:
    flat = [path.stem for path in (ROOT / "ldm_vae").glob("*.py") if not path.stem.startswith("__")]
    assert len(flat) <= 5, flat
    long = {str(path.relative_to(ROOT)) for path in [*LIBRARY, *PROGRAMS] if len(path.read_text().splitlines()) > 350}
    assert long == set()


def test_circles_are_seen() -> None:
    sources = {"a": "", "a.x": "def f():\n    from a.y import g", "a.y": "import a.z", "a.z": "from a import x"}
    assert circles(import_graph(sources)) == ["a.x -> a.y", "a.y -> a.z", "a.z -> a.x"]
    typed = sources | {"a.x": "if TYPE_CHECKING:\n    from a.y import g"}
    assert circles(import_graph(typed)) == []
    apart = {"a": "", "a.b": "", "a.b.x": "from a.c.x import f", "a.b.y": "", "a.c": "", "a.c.x": "from a.b import y"}
    assert circles(import_graph(apart)) == []
    assert circles(level(import_graph(apart), "a")) == ["a.b -> a.c", "a.c -> a.b"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_imports_the_library_and_no_other_program(path: Path) -> None:
    # in a wheel the programs lie in ldm_vae/programs, where `train` and `eval` are not importable: a program may name a
    # file of its own folder (`from .timing import ...`), which works with -m in both places, and nothing else of ours
    found = imports(path.read_text())
    assert not [name for name in found if name.split(".")[0] in ("train", "eval", "tests") or name.startswith("..")]


def test_help_and_the_light_modules_do_not_import_torch() -> None:
    code = (
        "import sys, ldm_vae, ldm_vae.cli, ldm_vae.core.errors, ldm_vae.core.config, ldm_vae.core.rng\n"
        "ldm_vae.cli.parser().format_help()\n"
        "print([name for name in ('torch', 'diffusers', 'accelerate', 'datasets', 'tyro') if name in sys.modules])\n"
        "import ldm_vae.latent_store.read.dataset\n"  # what a spawned worker imports, with torch
        "print([name for name in ('diffusers', 'accelerate', 'datasets', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["[]", "[]"]
