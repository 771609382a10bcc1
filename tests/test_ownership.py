"""One job at a time writes a folder: by the system's lock, and by the record where there is none."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from file_systems import without_locks
from fork_server import fork
from kills import wait_for
from sentences import refused
from training_runs import one_sentence

from ldm_vae.core import atomic_io, ownership
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import (
    LEASE,
    LOCK,
    MARK,
    is_mark,
    own,
    own_name,
    own_together,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 3.0)


@pytest.fixture(params=["locks", pytest.param("no locks", marks=pytest.mark.slow)])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With locks, and one that answers as many network file systems do."""
    if request.param == "no locks":
        without_locks(monkeypatch)
    return str(request.param)


def contend(folder: Path) -> list[Exception]:
    """Errors that another thread meets when it wants the folder."""
    met: list[Exception] = []

    def other() -> None:
        try:
            with own(folder, "OUT"):
                pass
        except (UsageError, WorkError) as error:
            met.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return met


def test_the_second_is_refused_and_the_next_is_not(tmp_path: Path, file_system: str) -> None:
    with own(tmp_path / "store", "OUT") as owner:
        (error,) = contend(tmp_path / "store")
        assert isinstance(error, UsageError) and "OUT" in str(error)
        owner.check()
        with refused(UsageError, "OUT"), own(tmp_path / "store", "OUT"):  # not even a thread itself
            pass
        owner.check()
    assert contend(tmp_path / "store") == []


def test_the_second_waits_for_the_end_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 60.0)
    met: list[list[Exception]] = []
    waiting = threading.Event()
    monkeypatch.setattr(ownership, "print", lambda *_, **__: waiting.set(), raising=False)
    with own(tmp_path / "store", "OUT"):
        second = threading.Thread(target=lambda: met.append(contend(tmp_path / "store")))
        second.start()
        assert waiting.wait(60)
        assert met == []
    second.join()
    assert met == [[]]


def test_nothing_is_left_in_a_folder_or_of_it(tmp_path: Path, file_system: str) -> None:
    def fail(folder: Path) -> None:
        with own(folder, "output_dir"):
            raise UsageError("data.path: nothing is there")

    (tmp_path / "mine").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for folder in (tmp_path / "mine", tmp_path / "runs" / "new", tmp_path / "full"):
        with pytest.raises(UsageError, match=r"data\.path"):
            fail(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]
    with own(tmp_path / "new", "OUT"):
        (tmp_path / "new" / "result").touch()
    with own_name(tmp_path / "named"):
        pass
    # what was written stays marked as ours
    assert sorted(path.name for path in tmp_path.rglob("*")) == [MARK, "file", "full", "mine", "new", "result"]
    assert (tmp_path / "new" / MARK).exists()


def test_a_folder_with_images_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.HEIC").touch()
    with refused(UsageError, "OUT"), own(tmp_path / "photos", "OUT"):
        raise AssertionError
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.HEIC"]
    for _ in range(2):  # its own images are no reason
        with own(tmp_path / "ours", "OUT"):
            (tmp_path / "ours" / "a.png").touch()


def test_who_waits_in_vain_leaves_the_marks_where_they_are(tmp_path: Path) -> None:
    with own(tmp_path / "run", "output_dir") as owner:
        for _ in range(2):
            assert len(contend(tmp_path / "run")) == 1
        assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK, LEASE, MARK}
        owner.check()


def hold() -> None:
    """A process that owns a folder until it is killed, and asks whether it is still its own when there is a file `ask`;
    with a third word, without the system's locks."""
    folder = Path(sys.argv[1])
    patch = pytest.MonkeyPatch()
    patch.setattr(ownership, "LEASE_SECONDS", 3.0)
    if len(sys.argv) > 2:
        without_locks(patch)
    with own(folder, "OUT") as owner:
        (folder / "held").touch()
        while not (folder / "ask").exists():
            time.sleep(0.05)
        owner.check()


@pytest.mark.parametrize("words", [(), pytest.param(("no locks",), marks=pytest.mark.slow)])
def test_a_killed_process_owns_nothing(tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if words:
        without_locks(monkeypatch)
    first = fork(hold, [str(tmp_path / "store"), *words])
    wait_for(tmp_path / "store" / "held", first)
    assert [type(error) for error in contend(tmp_path / "store")] == [UsageError]
    first.kill(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    assert contend(tmp_path / "store") == []


def die_before_the_record() -> None:
    """A process that is killed after its record is made, before anything is in it."""
    ownership.SoftFileLease._write_lock_info = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with own(Path(sys.argv[1]), "OUT"):
        pass


def test_a_process_killed_before_its_record_was_written_owns_nothing(tmp_path: Path) -> None:
    first = fork(die_before_the_record, [str(tmp_path / "store")])
    assert first.wait().returncode == -signal.SIGKILL
    assert (tmp_path / "store" / LEASE).read_bytes() == b""
    assert contend(tmp_path / "store") == []


@pytest.mark.slow
def test_who_was_suspended_for_too_long_learns_that_it_owns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record alone tells where there are no locks, or on another machine; nobody has touched it."""
    without_locks(monkeypatch)
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 60.0)
    first = fork(hold, [str(tmp_path / "store"), "no locks"])
    wait_for(tmp_path / "store" / "held", first)
    first.kill(signal.SIGSTOP)
    with own(tmp_path / "store", "OUT") as owner:
        (tmp_path / "store" / "ask").touch()
        first.kill(signal.SIGCONT)
        assert "OUT" in one_sentence(first.wait(), 1)
        owner.check()


def test_processes_of_one_launch_share_it_and_the_next_launch_waits_for_all(tmp_path: Path) -> None:
    """An orphan that still holds its part keeps a new launch out, though process 0 has ended."""
    folder = tmp_path / "store"
    meeting = threading.Barrier(2, timeout=60)
    go, held = threading.Event(), threading.Event()

    def member() -> None:
        with own_together(folder, "OUT", 1, meeting.wait) as owner:
            owner.check()
            held.set()
            go.wait(60)

    orphan = threading.Thread(target=member)
    orphan.start()
    with own_together(folder, "OUT", 0, meeting.wait) as owner:
        owner.check()
        assert held.wait(60)
    assert [type(error) for error in contend(folder)] == [UsageError]
    go.set()
    orphan.join()
    assert contend(folder) == []
    assert not folder.exists() or list(folder.iterdir()) == []


def test_marks_are_told_from_files() -> None:
    marks = (".lock", ".owner", ".lock.3", ".my-store.lock", ".my-store.owner", ".owner.break.12.ab")
    assert all(is_mark(Path(name)) for name in marks)
    files = ("lock", "manifest.json", "a.lock", ".hidden", "owner")
    assert not any(is_mark(Path(name)) for name in files)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(UsageError, "output"), own(tmp_path / "file", "output"):
        pass


@pytest.mark.parametrize("owned", [own, own_name])
def test_a_folder_that_cannot_be_made(tmp_path: Path, owned: Any) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WorkError, match="output"),  # and the system's words, so not golden
        owned(tmp_path / "file" / "new", "output"),
    ):
        pass


# --- a name for a whole folder ----------------------------------------------------------------------------------------


def test_of_two_that_write_one_name_the_second_says_the_truth(tmp_path: Path, file_system: str) -> None:
    """Nothing of the first's is removed while it is at work, and the second does not put its own over it."""
    met: list[Exception] = []

    def second() -> None:
        try:
            with atomic_io.whole_folder(tmp_path / "out") as folder:
                (folder / "of").write_text("second")
        except UsageError as error:
            met.append(error)

    with atomic_io.whole_folder(tmp_path / "out") as folder:
        (folder / "of").write_text("first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert [type(error) for error in met] == [UsageError]
        assert folder.is_dir()
    assert (tmp_path / "out" / "of").read_text() == "first"
    with refused(UsageError, "OUT"), atomic_io.whole_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_that_somebody_else_has_taken_meanwhile(tmp_path: Path) -> None:
    with refused(UsageError, "OUT"), atomic_io.whole_folder(tmp_path / "out") as folder:
        (folder / "of").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "of").write_text("theirs")
    assert (tmp_path / "out" / "of").read_text() == "theirs"


def test_processes_that_own_leave_no_threads_behind(tmp_path: Path) -> None:
    before = psutil.Process().num_threads()
    for _ in range(5):
        with own(tmp_path, "OUT"):
            pass
    assert psutil.Process().num_threads() <= before + 1
