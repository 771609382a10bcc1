"""Typed requests: what a dataclass says is what the command line takes, and what comes back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ldm_vae.core.request import Action, add_actions, add_request, argument, flag, shared


@dataclass(frozen=True, kw_only=True)
class Request:
    sources: tuple[Path, ...] = argument("SRC", "files", nargs="+")
    out: str = argument("OUT", "a folder")
    side: int | None = flag("pixels", metavar="N")
    kind: Literal["a", "b"] = flag("which", "a")
    shares: tuple[float, ...] = flag("several", (0.5,), nargs="+")
    loud: bool = flag("say it", False)
    from_format: str | None = flag("this", name="from", one_of="ways")
    to_format: str | None = flag("or that", name="to", one_of="ways")
    extra: str = shared(lambda parser: parser.add_argument("--more"), lambda arguments: f"<{arguments.more}>")


def parsed(*words: str) -> Any:
    seen: list[Any] = []
    parser = argparse.ArgumentParser()
    add_request(parser, Request, seen.append)
    arguments = parser.parse_args(words)
    arguments.run(arguments)
    return seen[0]


def test_what_is_not_given_is_its_default() -> None:
    assert parsed("x", "out", "--to", "y") == Request(
        sources=(Path("x"),), out="out", side=None, kind="a", shares=(0.5,), loud=False, from_format=None,
        to_format="y", extra="<None>",
    )  # fmt: skip


def test_what_is_given_has_its_type() -> None:
    found = parsed(
        "x", "z", "out", "--side", "3", "--kind", "b", "--shares", "1", "2", "--loud", "--from", "q", "--more", "m"
    )
    assert found == Request(
        sources=(Path("x"), Path("z")), out="out", side=3, kind="b", shares=(1.0, 2.0), loud=True, from_format="q",
        to_format=None, extra="<m>",
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("x", "--to", "y"),
        ("x", "out"),
        ("x", "out", "--to", "y", "--from", "z"),
        ("x", "out", "--to", "y", "--kind", "c"),
        ("x", "out", "--to", "y", "--side", "many"),
    ],
)
def test_a_wrong_call_ends_with_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(*words)
    assert left.value.code == 2 and "error: " in capsys.readouterr().err


def test_an_action_gets_its_own_request() -> None:
    seen: list[Any] = []
    parser = argparse.ArgumentParser()
    add_actions(parser, {"do": Action("do it", Request, seen.append), "other": Action("not it", Request, print)})
    arguments = parser.parse_args(["do", "x", "out", "--to", "y"])
    arguments.run(arguments)
    assert seen[0].out == "out"
