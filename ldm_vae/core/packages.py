"""Packages as files: downloaded by pip or apt-get, which honour the user's index and proxy, and never installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path


def download(requirement: str, sha256: str, folder: Path, *, binary: bool) -> Path:
    """Download a package into `folder`; returns its one file.

    Args:
        requirement: `name==version`.
        sha256: of the file, which pip checks before it does anything with it.
        binary: its wheel, else its source distribution.

    Raises:
        ValueError: there is no pip.
        subprocess.CalledProcessError: pip fails; `reason` says why.
    """
    if importlib.util.find_spec("pip") is None:
        raise ValueError("this environment has no pip, which `python -m ensurepip` or `uv pip install pip` adds")
    name, _, _ = requirement.partition("==")
    # as a hashed requirement: pip checks it before it asks the sdist's own build script for the metadata
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    kind = "--only-binary" if binary else "--no-binary"
    choose = ["--no-deps", kind, name, "--dest", str(folder), "--requirement", str(wanted)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's progress bar
    subprocess.run([*pip, *choose], check=True, stdout=shown, stderr=subprocess.PIPE, text=True)
    (archive,) = folder.glob("*.whl" if binary else "*.tar.gz")
    return archive


def unpack_debian(name: str, folder: Path) -> None:
    """Download a Debian package and unpack its files to `folder`, which is made.

    Raises:
        ValueError: there is no apt-get or dpkg-deb.
        subprocess.CalledProcessError: one of them fails; `reason` says why.
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise ValueError(f"this system has no {missing[0]} (Debian, Ubuntu)")
    folder.mkdir(parents=True)
    # `download` needs no rights, but lists of packages that a fresh container may lack: `apt-get update` says so
    subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True, text=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive.name, "."], cwd=folder, check=True, capture_output=True, text=True)


def reason(failure: Exception) -> str:
    """The sentence of pip's, or of another failure."""
    said = str(getattr(failure, "stderr", None) or failure).strip().splitlines()
    errors = [
        line.removeprefix("ERROR: ").removeprefix("E: ") for line in said if line.startswith(("ERROR: ", "E: "))
    ]  # pip's, apt-get's
    return (errors or said or [type(failure).__name__])[-1].rstrip(".")
