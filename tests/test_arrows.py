"""Who may import whom: config <- parts <- objective, step <- programs <- tests, and what starts fast stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    if name in ("config.py", "errors.py", "keyed.py"):  # the base: below everything
        bad += [module for module in found if module.startswith("ldm_vae.") and not module.startswith("ldm_vae.errors")]
    if name.startswith(("losses/", "quantizers/", "perturbations/", "discriminators/")):
        package = f"ldm_vae.{name.split('/')[0]}."
        siblings = {path.stem for path in (ROOT / "ldm_vae" / name).parent.glob("*.py")} - {"__init__"}
        bad += [module for module in found if module.startswith(package) and module.split(".")[2] in siblings]
    if name.split("/")[0] in ("data", "losses", "latent_store", "metrics", "export"):
        bad += [
            module for module in found if module.startswith(("ldm_vae.commands", "ldm_vae.cli", "ldm_vae.training"))
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
    assert wrong_in_library("config.py", "from ldm_vae.step import TrainingStep") != []
    assert wrong_in_library("config.py", "from ldm_vae.errors import UsageError") == []
    assert wrong_in_library("step.py", "def f():\n    from train import autoencoder") != []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_imports_the_library_and_no_other_program(path: Path) -> None:
    # in a wheel the programs lie in ldm_vae/programs, where `train` and `eval` are not importable: a program may name a
    # file of its own folder (`from .timing import ...`), which works with -m in both places, and nothing else of ours
    found = imports(path.read_text())
    assert not [name for name in found if name.split(".")[0] in ("train", "eval", "tests") or name.startswith("..")]


def test_help_and_the_light_modules_do_not_import_torch() -> None:
    code = (
        "import sys, ldm_vae, ldm_vae.cli, ldm_vae.errors, ldm_vae.config, ldm_vae.keyed\n"
        "ldm_vae.cli.parser().format_help()\n"
        "print([name for name in ('torch', 'diffusers', 'accelerate', 'datasets', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
