"""The wheel and the editable install: what they hold, and that a wheel trains outside the clone."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from images import write_images
from repository import ROOT

from ldm_vae.report.contents import read_contents
from ldm_vae.report.tables import commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # without --wheel: the source distribution first, and the wheel from that, as both are published
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's bin folder; the dependencies are this interpreter's, so nothing is downloaded."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600, check=False)


IN_TURN = """
import json, os, runpy, sys
import diffusers, torch
import ldm_vae.cli, ldm_vae.export.workflow
statuses = []
for program, *words in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if not (child := os.fork()):
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")  # leaves with the program's status
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def run_in_turn(installed: Path, calls: list[list[str]], cwd: Path) -> tuple[list[int], str]:
    """Programs of the environment, each the script that stands in `installed`, in forks of one interpreter of it: it
    imports torch once. Their statuses, and all that they said."""
    lines = [[str(installed / program), *words] for program, *words in calls]
    done = run([str(installed / "python"), "-c", IN_TURN, json.dumps(lines)], cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_the_distributions_are_ready_to_publish(wheel: Path) -> None:
    source = next(wheel.parent.glob("*.tar.gz"))
    done = run([sys.executable, "-m", "twine", "check", "--strict", str(source), str(wheel)], wheel.parent)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
    with tarfile.open(source) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    # what a wheel is built from, and what a packager runs
    assert names >= {"build_programs.py", "ldm_vae/py.typed", "train/autoencoder.py", "tests/conftest.py", "Makefile"}


def test_the_top_level_is_the_package_and_its_metadata(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert sorted(top.split("-")[0] for top in tops) == ["ldm_vae", "ldm_vae"]  # ldm_vae and ldm_vae-X.dist-info
    for program in ("train/autoencoder.py", "train/diffusion.py", "eval/reconstruction.py", "configs/demo.yaml",
                    "configs/diffusion/demo.yaml", "train/prior.py", "configs/prior/demo.yaml"):  # fmt: skip
        assert f"ldm_vae/programs/{program}" in names
    assert "ldm_vae/py.typed" in names
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".pth"))]


def test_every_module_imports_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, ldm_vae\n"
        "names = [m.name for m in pkgutil.walk_packages(ldm_vae.__path__, 'ldm_vae.') if '__main__' not in m.name]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(len(names), ldm_vae.__file__)"
    )
    done = run([str(installed / "python"), "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    count, file = done.stdout.split()
    assert int(count) > 30 and str(installed.parent) in file


def test_an_installed_wheel_trains_and_evaluates(installed: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    train = [str(installed / "ldm-vae"), "train", "smoke", "--data.path", "photos", "--max_train_images", "8"]
    done = run([*train, "--validation_data.path", "photos", "--output_dir", "mine"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "vae" / "config.json").is_file()
    evaluate = [str(installed / "ldm-vae"), "evaluate", "mine", "photos", "--output", "measured", "--resolution", "32"]
    done = run([*evaluate, "--metrics", "psnr,ssim"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measured" / "metrics.json").is_file()


def test_every_command_that_a_page_prints_runs_where_it_was_printed(installed: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    (tmp_path / "own.yaml").write_text("include: smoke\nmax_train_images: 8\noutput_dir: mine\ndata: {path: photos}\n")
    calls = [
        ["train", "own.yaml", "--validation_data.path", "photos"],
        ["evaluate", "mine", "photos", "--output", "mine/report", "--resolution", "32", "--metrics", "psnr"],
        ["evaluate", "--help"],
        ["train", "own.yaml", "--resolutoin", "3"],
    ]
    statuses, said = run_in_turn(installed, [["ldm-vae", *words] for words in calls], tmp_path)
    assert statuses == [0, 0, 0, 2], said
    assert "usage: ldm-vae evaluate" in said and "python -m" not in said
    found = commands(read_contents(tmp_path / "mine"))
    assert [line.split()[:2] for line in found] == [["ldm-vae", verb] for verb in ("train", "evaluate", "report")]
    statuses, said = run_in_turn(installed, [shlex.split(line) for line in found], tmp_path)
    assert statuses == [0, 0, 0], said


def test_an_editable_install_shows_the_package_only(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-e"]
    done = run([*install, str(ROOT)], tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('ldm_vae', 'train', 'eval', 'configs')])"
    assert run([python, "-c", code], tmp_path).stdout.strip() == "[True, False, False, False]"
