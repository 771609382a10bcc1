"""Bad images are counted once, written down, and stop the run only when they should."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
from sentences import refused

from ldm_vae.core.errors import WorkError
from ldm_vae.data.quarantine import Bad, BadImage, Quarantine, read_quarantine


def test_counted_once_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(100, path=path)
    quarantine.add([Bad("a", "empty"), Bad("b", "über")], good=3)
    quarantine.add([Bad("a", "empty")], good=5)
    assert (quarantine.count, quarantine.good) == (2, 8)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"key": "a", "reason": "empty"},
        {"key": "b", "reason": "über"},
    ]
    again = Quarantine(100, path=path)  # the run goes on
    again.add([Bad("b", "über"), Bad("c", "cut")])
    assert [bad.key for bad in read_quarantine(path)] == ["a", "b", "c"]
    assert len(path.read_text().splitlines()) == 3


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea')
    assert read_quarantine(path) == [Bad("a", "x")]
    assert read_quarantine(tmp_path / "none") == []


def test_max_bad_is_a_share_of_the_source() -> None:
    quarantine = Quarantine(100, max_bad=0.02)
    quarantine.add([Bad("a", "x"), Bad("b", "x")])
    with refused(WorkError, "max_bad") as error:
        quarantine.add([Bad("c", "x")])
    assert "3 of 100 are bad, the first is a (x)" in str(error.value)
    with refused(WorkError, "max_bad"):
        Quarantine(100, max_bad=0.0).add([Bad("a", "x")])
    never = Quarantine(2)
    never.add([Bad("a", "x"), Bad("b", "x")])
    assert never.count == 2


def test_of_a_stream_the_share_is_judged_at_its_end() -> None:
    stream = Quarantine(None, max_bad=0.1)
    stream.add([Bad("a", "x")], good=1)  # half of two: too early to say
    with refused(WorkError, "max_bad"):
        stream.finish()
    long = Quarantine(None, max_bad=0.1)
    long.add([], good=700)
    with refused(WorkError, "max_bad"):
        long.add([Bad(str(i), "x") for i in range(200)])


def test_warns_once_above_one_percent(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(100)
    with caplog.at_level(logging.WARNING):
        quarantine.add([Bad("a", "x")])
        assert not caplog.records
        quarantine.add([Bad("b", "x")])
        quarantine.add([Bad("c", "x")])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more than 1 %" in caplog.text


def test_nothing_usable_is_a_failure() -> None:
    with refused(WorkError, "data"):
        Quarantine(0).finish()
    quarantine = Quarantine(1)
    quarantine.add([Bad("a", "not an image")])
    with refused(WorkError, "image") as error:
        quarantine.finish()
    assert "1 of 1 are bad, the first is a (not an image)" in str(error.value)


def test_bad_image_crosses_processes() -> None:
    assert pickle.loads(pickle.dumps(BadImage("cut off"))).reason == "cut off"
