"""The command line: what it lists, what it refuses, and the exit statuses that other programs rely on."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from fork_server import Finished, fork
from repository import ROOT

from ldm_vae import cli


def ldm_vae(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm_vae", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


def forked(*arguments: str, cwd: Path = ROOT) -> Finished:
    """The same without the seconds in which an interpreter imports torch."""
    return fork(partial(main_in, cwd), arguments).wait()


def main_in(folder: Path) -> None:
    os.chdir(folder)
    cli.main()


def test_help_teaches_the_four_commands() -> None:
    done = ldm_vae("--help")
    assert done.returncode == 0
    for verb in ("train", "export", "encode", "evaluate", "assets", "config", "inspect", "store", "report"):
        assert f"  {verb} " in done.stdout, verb
    assert "ldm-vae encode my-vae PHOTOS my-latents" in done.stdout


@pytest.mark.parametrize(
    "verb", ["assets", "config", "decode", "encode", "export", "inspect", "reconstruct", "report", "store"]
)
def test_every_verb_explains_itself(verb: str) -> None:
    done = ldm_vae(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"ldm-vae {verb}" in done.stdout
    assert len(done.stdout) > 300


@pytest.mark.slow
def test_the_programs_help_is_shown_by_their_verbs() -> None:
    assert "ldm-vae train" in forked("train", "--help").stdout
    assert "ldm-vae evaluate" in forked("evaluate", "--help").stdout
    assert "ldm-vae latent_space" in forked("latent_space", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bogus",), "got bogus"),
        (("train", "nothing.yaml"), "config nothing.yaml: no such file, and none that ships with the project"),
        (("config", "nothing"), "config nothing: no such file"),
        (("encode", "no-vae", "no-data", "out", "--resolution", "64"), "no-"),
        (("export", "no-vae", "out"), "no-vae"),
        (("store", "stats", "no-store"), "no-store"),
        (("inspect", "no-data"), "no-data"),
    ],
)  # fmt: skip
def test_a_wrong_call_ends_with_status_2_and_a_sentence(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = forked(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert says in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_config_lists_and_prints_what_ships() -> None:
    listed = ldm_vae("config").stdout
    assert "kl_f8_d4" in listed and "Stable Diffusion" in listed
    assert ldm_vae("config", "kl_f8_d4").stdout == (ROOT / "configs" / "kl_f8_d4.yaml").read_text()


def test_nobody_reading_its_output_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ldm_vae", "config"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("ldm-vae tr", "train"),
        ("ldm-vae enc", "encode"),
        ("ldm-vae store ver", "verify"),
        ("ldm-vae report ru", "runs"),
        ("ldm-vae encode --config ru", "runs"),
        ("ldm-vae encode --resol", "--resolution"),
        ("ldm-vae assets lp", "lpips"),
        ("ldm-vae --print_completion z", "zsh"),
    ],
)
def test_bash_completes(typed: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.call("--print_completion", "bash")
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "runs").mkdir()
    words = typed.split()
    script = (
        f"source completion; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        f"$(complete -p ldm-vae | sed 's/.*-F //; s/ .*//') ldm-vae {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == [completed], done.stderr


def test_zsh_shows_each_verb_with_its_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.call("--print_completion", "zsh")
    script = capsys.readouterr().out
    assert script.startswith("#compdef ldm-vae\n")
    for verb in ("encode", "drift", "store", "train"):
        line = importlib.import_module(f"ldm_vae.commands.{verb}").HELP.replace("'", "'\"'\"'")
        assert f"    {verb}:'{line}'\n" in script
