"""Publishing: on disk before it has its name, never over another's work, and nothing left of the killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm_vae.core import atomic_io


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the file system is asked for, in order: sync of a file or folder, link, rename."""
    asked: list[str] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        asked.append(f"sync {'folder' if os.path.isdir(f'/proc/self/fd/{descriptor}') else 'file'}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("link", "replace", "rename"):

        def named(*paths: object, name: str = name, real: object = getattr(os, name), **options: object) -> None:
            asked.append(name)
            real(*paths, **options)  # type: ignore[operator]

        monkeypatch.setattr(os, name, named)
    return asked


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, order: list[str]) -> None:
    atomic_io.replace(tmp_path / "a", atomic_io.data(b"first"))
    assert order == ["sync file", "replace", "sync folder"]
    order.clear()
    assert atomic_io.create(tmp_path / "b", atomic_io.data(b"first"))
    assert order == ["sync file", "link", "sync folder"]


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    assert atomic_io.create(tmp_path / "a", atomic_io.data(b"first"))
    assert not atomic_io.create(tmp_path / "a", atomic_io.data(b"second"))
    assert (tmp_path / "a").read_bytes() == b"first" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, order: list[str]) -> None:
    folder = atomic_io.beside(tmp_path / "out")
    (folder / "in").mkdir()
    for name in ("one", "in/two"):
        (folder / name).write_bytes(b"content")
    atomic_io.put(folder, tmp_path / "out")
    assert order == ["sync file", "sync file", "sync folder", "rename", "sync folder"]
    assert (tmp_path / "out" / "in" / "two").read_bytes() == b"content"


def test_what_killed_writers_left_goes_and_what_is_not_theirs_stays(tmp_path: Path) -> None:
    for name in ("out", "out.other", "o[u]t"):
        folder = atomic_io.beside(tmp_path / name)
        (folder / "file").write_bytes(b"left by a kill")
    (tmp_path / ".out.mine").mkdir()
    folder = atomic_io.beside(tmp_path / "out")
    atomic_io.put(folder, tmp_path / "out")
    left = sorted(path.name.split(".")[1] for path in tmp_path.iterdir() if atomic_io.is_temporary(path))
    assert left == ["o[u]t", "out"] and (tmp_path / ".out.mine").is_dir() and (tmp_path / "out").is_dir()
