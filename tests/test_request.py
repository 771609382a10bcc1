"""Typed requests: what a dataclass says is what the command line takes, and what comes back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ldm_vae.cli import parser
from ldm_vae.core.errors import UsageError
from ldm_vae.core.request import Action, Parser, add_actions, add_request, argument, flag, shared


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
    one = Parser(prog="do")
    add_request(one, Request, seen.append)
    arguments = one.parse_args(words)
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
    ("words", "named"),
    [
        (("x", "--to", "y"), "OUT"),
        (("x", "out"), "--from"),
        (("x", "out", "--to", "y", "--from", "z"), "--from"),
        (("x", "out", "--to", "y", "--kind", "c"), "--kind"),
        (("x", "out", "--to", "y", "--kind", "bb"), "--kind: expected one of a, b, got bb, did you mean `b`"),
        (("x", "out", "--to", "y", "--side", "many"), "--side"),
        (("x", "out", "--to", "y", "--side"), "--side"),
        (("x", "--sied", "3"), "--side"),  # rather than what is missing because of it
        (("x", "out", "--to", "y", "--shar=2"), "--shares"),  # half of a name is no name
        (("x", "out", "--to", "y", "--from-x"), "--from"),
        (("x", "out", "--to", "y", "--unheard_of"), "--unheard_of"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_sentence_that_names_the_argument(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named) as refusal:  # and argparse's words, so not golden
        parsed(*words)
    assert "\n" not in str(refusal.value) and "do --help" in str(refusal.value)


def test_what_stands_behind_two_dashes_is_no_flag() -> None:
    assert parsed("--to", "y", "--", "x", "--side").out == "--side"


def test_every_flag_of_every_verb_is_recognised_when_it_is_mistyped() -> None:
    """Two neighbouring letters exchanged, in the place of all that is required."""
    for words, one in verbs():
        for name in (name for action in one._actions for name in action.option_strings if len(name) > 5):
            typo = f"{name[:3]}{name[4]}{name[3]}{name[5:]}"
            if typo == name:
                continue
            with pytest.raises(UsageError) as refusal:
                parser().parse_args([*words, typo, "1"])
            assert f"unknown flag {typo}, did you mean `--" in str(refusal.value)


def verbs() -> list[tuple[list[str], argparse.ArgumentParser]]:
    found: list[tuple[list[str], argparse.ArgumentParser]] = [([], parser())]
    for words, one in found:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [([*words, name], inner) for name, inner in action.choices.items()]
    return [(words, one) for words, one in found if one._subparsers is None and "-" in one.prefix_chars]


@pytest.mark.parametrize(
    "words", [["--data.side", "3", "x", "--data.names=[a, b]"], ["x", "--data.names", "[a, b]", "--data.side=3"]]
)
def test_fields_of_a_section_are_taken_from_anywhere(words: list[str]) -> None:
    one = Parser(prog="do")
    one.section = "data"
    one.add_argument("name")
    for parse in (one.parse_args, one.parse_intermixed_args):
        found = parse(words)
        assert found.name == "x" and found.data_fields == {"side": "3", "names": ["a", "b"]}
    for wrong in (["x", "--data.side"], ["x", "--data.side", "--data.names", "a"], ["x", "--data.side", "[1"]):
        with pytest.raises(UsageError, match=r"--data\.side"):
            one.parse_args(wrong)


def test_an_action_gets_its_own_request() -> None:
    seen: list[Any] = []
    top = Parser()
    add_actions(top, {"do": Action("do it", Request, seen.append), "other": Action("not it", Request, print)})
    arguments = top.parse_args(["do", "x", "out", "--to", "y"])
    arguments.run(arguments)
    assert seen[0].out == "out"
