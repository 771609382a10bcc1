"""stdout, stderr and the arguments of the programs: any name and any encoding, closed and full, and faults of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import fork
from PIL import Image
from sentences import refused

from ldm_vae.cli import call
from ldm_vae.core import paths
from ldm_vae.core.errors import UsageError, run_program

NAMES = [b"\x1b[31mred", b"\x1b]0;title\x07", b"caf\xe9", "\u0085next".encode(), b"del\x7f", "日本".encode()]


def program(code: str, *words: str | bytes, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run `code` as the main of a program."""
    code = f"import os, sys\nfrom ldm_vae.core.errors import run_program\ndef main():\n    {code}\nrun_program(main)"
    settings: dict[str, Any] = {"capture_output": True, "timeout": 60, "check": False} | options
    return subprocess.run([sys.executable, "-c", code, *words], **settings)


def list_and_inspect() -> None:
    print(*sorted(os.listdir(".")))
    call("inspect", ".")


def with_streams_of_an_encoding() -> None:
    """The same with the streams that Python opens under PYTHONIOENCODING."""
    encoding, said = sys.argv[1:]
    one, other = (os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for _ in range(2))
    sys.stdout = os.fdopen(one, "w", encoding=encoding)
    sys.stderr = os.fdopen(other, "w", encoding=encoding, errors="backslashreplace")
    run_program(list_and_inspect)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_of_files_are_shown_and_not_obeyed(encoding: str, tmp_path: Path) -> None:
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(Path(os.fsdecode(bytes(tmp_path) + b"/" + name + b".png")))
    (tmp_path / "\x1b[2J.png").write_bytes(b"none")
    said = tmp_path.parent / f"{tmp_path.name}.said"
    ended = fork(with_streams_of_an_encoding, [encoding, str(said)], where=tmp_path).wait()
    text = said.read_text(encoding)
    assert ended.returncode == 0, text
    # the bar's carriage return and the newline move the cursor as they are meant to
    assert not [letter for letter in text if not letter.isprintable() and letter not in "\n\r\t"]
    assert r"\x1b[31mred" in text and r"\x1b[2J" in text and r"\udce9" in text
    assert ("日本" in text) == (encoding == "utf-8")


def test_a_bar_within_a_bar_may_move_the_cursor_up() -> None:
    assert program("sys.stderr.write('\\x1b[A'); sys.stderr.write('x\\x1b[A')").stderr == b"\x1b[Ax\\x1b[A"


@pytest.mark.parametrize("number", [1, 2])
def test_a_closed_output_is_no_error_and_goes_to_no_file(number: int, tmp_path: Path) -> None:
    code = "file = open('made', 'w'); print('out'); print('err', file=sys.stderr); os.write(1, b'x'); os.write(2, b'x')"
    ended = program(code, cwd=tmp_path, preexec_fn=lambda: os.close(number), capture_output=False)
    assert ended.returncode == 0
    assert (tmp_path / "made").read_bytes() == b""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_one_sentence(unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        ended = program(
            "print('x' * 100)",
            stdout=full,
            stderr=subprocess.PIPE,
            capture_output=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},  # the flush fails, or the print
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"error: ") and ended.stderr.count(b"\n") == 1


def test_a_fault_of_ours_is_one_sentence_and_a_file(tmp_path: Path) -> None:
    ended = program("{}['lost']", "word", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert ended.returncode == 70
    (kept,) = tmp_path.iterdir()
    assert ended.stderr.startswith(b"error: unexpected KeyError: 'lost'") and ended.stderr.count(b"\n") == 1
    assert str(kept).encode() in ended.stderr
    assert "Traceback" in kept.read_text() and "word" in kept.read_text()


def test_a_fault_inside_a_library_names_our_line_that_called_it(tmp_path: Path) -> None:
    ended = program(
        "from ldm_vae.core.validation import parse_json; parse_json(3)", env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert ended.returncode == 70
    assert b"core/validation.py:" in ended.stderr


def test_a_fault_of_ours_without_a_folder_for_its_file_is_one_sentence(tmp_path: Path) -> None:
    ended = program("import tempfile; tempfile.tempdir = '/proc/none'; {}['lost']")
    assert ended.returncode == 70
    assert ended.stderr.startswith(b"error: unexpected KeyError: 'lost'") and ended.stderr.count(b"\n") == 1


def test_an_argument_that_is_not_utf_8_is_refused_by_itself() -> None:
    ended = program("raise AssertionError", "good", b"caf\xe9")
    assert ended.returncode == 2
    assert ended.stderr.startswith(rb"error: argument caf\udce9: expected UTF-8")


def test_a_tilde_without_a_home_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.expanded("~nobody_of_this_name/x") == Path("~nobody_of_this_name/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no $HOME, and no such user
    with refused(UsageError, "XDG_CACHE_HOME"):
        paths.cache_dir()
