"""Modules of a user's own, as docs/extending.md shows them: found from the current folder, in training and in verbs."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from fork_server import fork
from images import write_images
from repository import ROOT
from sentences import refused
from training_runs import TINY

from eval import scramble
from ldm_vae import cli
from ldm_vae.autoencoder.preparation import plain
from ldm_vae.core.config import import_own
from ldm_vae.core.errors import UsageError
from ldm_vae.data.flags import DataFlags
from ldm_vae.latent_store import read_manifest
from ldm_vae.metrics.select import build_metrics


def write_modules(folder: Path) -> list[str]:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", text, re.DOTALL)
    for name, code in blocks:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return [name for name, _ in blocks]


def call(folder: Path, *words: object, main: Callable[[], None] = cli.main) -> str:
    done = fork(main, [*map(str, words)], where=folder).wait()
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def started_elsewhere() -> None:
    """The program where the current folder is not on the path by the way of starting it."""
    assert not {"", str(Path.cwd())} & {*sys.path}
    cli.main()


OWN = ("--kind", "my_lab.scans", "--data.pattern", "*.png")
PROBE = "--layers 1 --heads 2 --head_dim 8 --train_images 8 --batch_size 4 --seeds 1 --samples 4 --steps 1"
# every command that takes DATA, by the file that gives it its flags: each reads the same source of the user's own
COMMANDS = {
    "ldm_vae/commands/inspect.py": ["inspect scans"],
    "ldm_vae/commands/encode.py": ["encode vae scans store2 --resolution 32"],
    "ldm_vae/commands/store/__init__.py": [
        "store verify store --reencode 2 --data scans",
        "store repair damaged --data scans",
    ],
    "ldm_vae/commands/drift.py": ["drift vae vae scans --no_lpips --resolution 32"],
    "ldm_vae/commands/fp16.py": ["fp16 audit vae scans", "fp16 fix vae half scans"],
    "ldm_vae/export/request.py": ["export vae again --stats scans --drift_from vae"],
    "eval/reconstruction.py": ["evaluate vae scans --metrics psnr --resolution 32 --output found"],
    "eval/latent_space.py": ["latent_space vae scans --resolution 32 --likelihood_images 2 --output space"],
    "eval/diffusability.py": [f"probe vae scans --resolution 32 --output probed {PROBE}"],
    "eval/scramble.py": ["eval.scramble vae scans scrambled --resolution 32 --images 4"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules of the docs, images that only they read right, and the network trained on them."""
    folder = tmp_path_factory.mktemp("lab")
    assert len(write_modules(folder)) == 6
    write_images(folder / "scans", 6)
    (folder / "scans" / "notes.jpg").write_text("no scan")  # what `kind: folder` would stop at
    settings = TINY | {
        "output_dir": "run",
        "data": {"kind": "my_lab.scans", "path": "scans", "pattern": "*.png"},
        "model": TINY["model"] | {"kind": "my_lab.grey", "use_quant_conv": True, "use_post_quant_conv": True},  # type: ignore[operator]
        "losses": {"l1": {}, "edges": {"kind": "my_lab.edges", "weight": 0.1}},
        "discriminator": {"kind": "my_lab.critic", "width": 8},
        "perturbations": {"shrink": {"kind": "my_lab.shrink"}},
        "max_train_images": 8,
        "dataloader_num_workers": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    call(folder, "train", "config.yaml")
    call(folder, "export", "run", "vae", "--stats", "scans", *OWN)
    call(folder, "encode", "vae", "scans", "store", "--resolution", 32, *OWN)
    shutil.copytree(folder / "store", folder / "damaged")
    for shard in (folder / "damaged" / "shards").glob("*.safetensors"):
        shard.write_bytes(b"")
    return folder


@pytest.mark.slow
def test_modules_of_the_current_folder_serve_in_training_and_as_a_metric(lab: Path) -> None:
    lines = [json.loads(line) for line in (lab / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/edges" in line for line in lines)
    assert read_manifest(lab / "store").samples == 6
    metrics = ("--metrics", "psnr,my_lab.sharpness", "--resolution", "32", "--output", "measured")
    call(lab, "evaluate", "vae", "scans", *OWN, *metrics, main=started_elsewhere)
    found = json.loads((lab / "measured" / "metrics.json").read_text())
    assert found["data"]["images"] == 6 and found["metrics"]["my_lab.sharpness"]["better"] == "higher"
    assert "sharpness ↑" in (lab / "measured" / "metrics.md").read_text()
    call(lab, "report", "measured")
    assert "sharpness" in (lab / "measured" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for some in COMMANDS.values() for one in some])
def test_a_source_of_the_current_folder_serves_in_every_command_with_data(command: str, lab: Path) -> None:
    program, *words = command.split()
    main, words = (scramble.main, words) if program == "eval.scramble" else (cli.main, [program, *words])
    said = call(lab, *words, *OWN, main=main)
    assert "notes.jpg" not in said  # which any other source would read, or name; and its keys would be others
    assert words[:2] != ["store", "repair"] or "unit 0: encoded again" in said


def test_every_command_with_data_is_tried_with_a_source_of_the_users_own() -> None:
    programs = [file for part in ("ldm_vae", "train", "eval") for file in (ROOT / part).rglob("*.py")]
    given = {
        file.relative_to(ROOT).as_posix()
        for file in programs
        if re.search(r"(?<!def )(data_flags|add_data_arguments)\(", file.read_text(encoding="utf-8"))
    }
    assert given == {*COMMANDS}


def test_a_folder_stands_in_for_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "tabnanny"):  # the other one is Python's, and nothing has imported it yet
        (tmp_path / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tabnanny", raising=False)
    assert import_own("mine").__file__ == str(tmp_path / "mine.py")
    assert import_own("tabnanny").__file__ != str(tmp_path / "tabnanny.py")


@pytest.mark.parametrize(
    "body", ["", "def build(): return 3", "raise RuntimeError('no')", "import sys; sys.exit()", "build = None", "("]
)
def test_a_module_without_a_metric_is_one_sentence(body: str, module: Callable[[str], str]) -> None:
    path = module(body)
    with pytest.raises(UsageError, match=f"metrics: {path}") as refusal:  # and Python's words, so not golden
        build_metrics([path], torch.device("cpu"), 32)
    assert "\n" not in str(refusal.value)


def test_a_source_that_decodes_otherwise_than_the_network_takes_images_is_refused(module: Callable[[str], str]) -> None:
    path = module(
        "from ldm_vae.core.config import Part\nfrom ldm_vae.data.decoding import Decoding\n"
        "class Grey:\n    decoding = Decoding(channels=1)\n"
        "class Config(Part):\n    path: str\n    channels: int = 3\n    def build(self): return Grey()\n"
    )
    with refused(UsageError, "data"):
        plain(DataFlags(kind=path)).open("x")
    assert plain(DataFlags(kind=path, channels=1)).open("x").decoding.channels == 1


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the current folder, and gives its dotted path."""

    def write(body: str) -> str:
        name = f"lab_{secrets.token_hex(4)}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(body)
        return f"{name}.own"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return write
