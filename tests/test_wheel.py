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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    return environment(tmp_path_factory.mktemp("venv"), str(wheel))


def environment(folder: Path, *installs: str) -> Path:
    """With what is installed by this interpreter's pip, without seconds of one more that is unpacked."""
    venv.create(folder)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    done = run([*pip, "--no-deps", "--no-index", *installs], folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=outside(), timeout=600, check=False)


def outside() -> dict[str, str]:
    """The variables of an interpreter that does not know of the clone."""
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return known | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


IN_TURN = """
import importlib, json, os, pkgutil, runpy, sys
import ldm_vae
names = [m.name for m in pkgutil.walk_packages(ldm_vae.__path__, "ldm_vae.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names), ldm_vae.__file__, flush=True)
for line in sys.stdin:
    folder, said, program, *words = json.loads(line)
    if not (child := os.fork()):
        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")  # leaves with the program's status
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Served:
    """One interpreter of the environment, which imports every module outside the clone and then runs programs in forks:
    torch is imported once."""

    bin: Path
    process: subprocess.Popen[str]
    modules: int
    package: str

    def run(self, cwd: Path, *calls: Sequence[str]) -> tuple[list[int], str]:
        """Programs, each the script that stands in the environment: their statuses, and all that they said."""
        statuses, said = [], cwd / "said.txt"
        assert self.process.stdin is not None and self.process.stdout is not None
        for program, *words in calls:
            self.process.stdin.write(json.dumps([str(cwd), str(said), str(self.bin / program), *words]) + "\n")
            self.process.stdin.flush()
            statuses.append(int(self.process.stdout.readline()))
        return statuses, said.read_text()


@pytest.fixture(scope="module")
def served(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    command = [str(installed / "python"), "-c", IN_TURN]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with (
        (elsewhere / "errors").open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=elsewhere,
            env=outside(),
        ) as one,
    ):  # fmt: skip
        assert one.stdout is not None
        said = one.stdout.readline().split()
        assert said, (elsewhere / "errors").read_text()
        yield Served(installed, one, int(said[0]), said[1])


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


def test_every_module_imports_outside_the_clone(served: Served) -> None:
    assert served.modules > 30 and str(served.bin.parent) in served.package


def test_an_installed_wheel_trains_and_evaluates(served: Served, tmp_path: Path) -> None:
    """The first as a user starts it, in an interpreter of its own."""
    write_images(tmp_path / "photos", 6)
    train = [str(served.bin / "ldm-vae"), "train", "smoke", "--data.path", "photos", "--max_train_images", "8"]
    done = run([*train, "--validation_data.path", "photos", "--output_dir", "mine"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "vae" / "config.json").is_file()
    evaluate = ["ldm-vae", "evaluate", "mine", "photos", "--output", "measured", "--resolution", "32"]
    statuses, said = served.run(tmp_path, [*evaluate, "--metrics", "psnr,ssim"])
    assert statuses == [0], said
    assert (tmp_path / "measured" / "metrics.json").is_file()


def test_every_command_that_a_page_prints_runs_where_it_was_printed(served: Served, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    (tmp_path / "own.yaml").write_text("include: smoke\nmax_train_images: 8\noutput_dir: mine\ndata: {path: photos}\n")
    calls = [
        ["train", "own.yaml", "--validation_data.path", "photos"],
        ["evaluate", "mine", "photos", "--output", "mine/report", "--resolution", "32", "--metrics", "psnr"],
        ["evaluate", "--help"],
        ["train", "own.yaml", "--resolutoin", "3"],
    ]
    statuses, said = served.run(tmp_path, *(["ldm-vae", *words] for words in calls))
    assert statuses == [0, 0, 0, 2], said
    assert "usage: ldm-vae evaluate" in said and "python -m" not in said
    found = commands(read_contents(tmp_path / "mine"))
    assert [line.split()[:2] for line in found] == [["ldm-vae", verb] for verb in ("train", "evaluate", "report")]
    statuses, said = served.run(tmp_path, *(shlex.split(line) for line in found))
    assert statuses == [0, 0, 0], said


def test_an_editable_install_shows_the_package_only(tmp_path: Path) -> None:
    python = str(environment(tmp_path / "venv", "--no-build-isolation", "-e", str(ROOT)) / "python")
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('ldm_vae', 'train', 'eval', 'configs')])"
    assert run([python, "-c", code], tmp_path).stdout.strip() == "[True, False, False, False]"
