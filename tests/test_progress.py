"""Progress: a bar on a terminal, whole lines in a file, and the words with which work is stopped."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from ldm_vae.core import progress
from ldm_vae.core.errors import SIGNALS
from ldm_vae.core.progress import Progress

LINE = re.compile(r"train: 40 of 100 img \(40%\), [\d.,]+ img/s, \d\d:\d\d left; l1=0\.5, kl=3")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_where_one_is_reported_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(desc="train", total=100, initial=20, unit="img", on_report=True)
    for _ in range(20):
        bar.update(1)
    bar.report({"l1": "0.5", "kl": "3"})
    bar.say("warning: nothing")
    bar.update(60)
    bar.close()
    line, warning, end = capsys.readouterr().err.split("\n")
    assert LINE.fullmatch(line), line
    assert (warning, end) == ("warning: nothing", "")


def test_the_rate_is_that_since_the_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    bar = Progress(total=100, unit="img", on_report=True)
    bar.update(20)
    bar.report({})
    bar.update(10)
    bar.report({})
    assert re.findall(r"([\d.]+) img/s", capsys.readouterr().err) == ["2", "0.5"]


def test_long_work_shows_itself_by_the_clock_and_short_work_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(Progress(range(1000), "look")) == [*range(1000)]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    for _ in Progress(range(3), "look", unit="files", leave=False):
        pass
    with Progress(desc="pull", total=2_000_000, unit="B", unit_scale=True) as bar:
        bar.update(1_000_000)
    said = capsys.readouterr().err
    assert "look: 2 of 3 files (67%), " in said and "pull: 1.00M of 2.00M B (50%), " in said
    assert "\r" not in said and "\x1b" not in said and said.endswith("\n")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    bar = Progress(desc="train", total=100, unit="img", on_report=True, mininterval=0)
    bar.update(40)
    bar.report({"l1": "0.5"})
    bar.say("warning: nothing")
    bar.close()
    assert "\rtrain:  40%|" in shown.getvalue() and "l1=0.5]" in shown.getvalue()
    assert "warning: nothing\n" in shown.getvalue()


def test_the_first_of_several_processes_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    bar = Progress(total=100, on_report=True)
    bar.update(5)
    bar.report({"l1": "0.5"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_says_by_what_and_what_is_left(number: int, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom ldm_vae.core.errors import resumable, run_program\n"
        "def main():\n    with resumable('half is kept; the same command goes on'):\n"
        "        try:\n            signal.alarm(60)\n            print('begun')\n            signal.pause()\n"
        "        finally:\n            open('cleaned', 'w')\nrun_program(main)"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert victim.stdout is not None
    assert victim.stdout.readline() == "begun\n"  # written when it is printed, not when the buffer is full
    victim.send_signal(number)
    _, said = victim.communicate()
    assert said == f"stopped by {SIGNALS[number]}: half is kept; the same command goes on\n"
    assert victim.returncode == 128 + number and (tmp_path / "cleaned").exists()
