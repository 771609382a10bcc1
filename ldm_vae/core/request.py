"""Typed requests: a dataclass is a command line. Each flag stands once, with its type, default and help.

The type says what argparse does with a field: `bool` is a switch, a `Literal` gives the choices, a tuple takes several
values, `X | None` may be absent. Nothing heavy is imported: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import shtab

from ldm_vae.core.errors import UsageError
from ldm_vae.core.overrides import value_of
from ldm_vae.core.programs import words_of
from ldm_vae.core.text import nearest, not_among

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse with one sentence for what is wrong, an unknown flag first, and no flag by half of its name; and with
    `--SECTION.NAME VALUE` for fields that are known only to what SECTION turns out to be."""

    section: str | None = None
    """Those fields are in `SECTION_fields` of what was parsed, by name."""

    def __init__(self, *arguments: Any, program: str | None = None, **options: Any) -> None:
        """program: the module of one; its usage and errors name it as a user starts it."""
        ours: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        if program is not None:
            ours["prog"] = " ".join(words_of(program))
        super().__init__(*arguments, **(ours | options))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else [*args]
        words, fields = self._take_fields(words)
        if self._subparsers is None and "-" in self.prefix_chars:  # what stands behind a verb is that verb's affair
            self._check_flags(words)
        found, rest = super().parse_known_args(words, namespace)
        if self.section is not None:  # argparse parses twice where flags and arguments mix
            setattr(found, f"{self.section}_fields", getattr(found, f"{self.section}_fields", {}) | fields)
        return found, rest

    def _take_fields(self, words: list[str]) -> tuple[list[str], dict[str, Any]]:
        left: list[str] = []
        fields: dict[str, Any] = {}
        coming = iter(words)
        for word in coming:
            if self.section is None or not word.startswith(f"--{self.section}."):
                left.append(word)
                continue
            name, equals, value = word.partition("=")
            value = value if equals else next(coming, "--")
            if value.startswith("--"):
                self.error(f"argument {name}: expected one argument")
            fields[name.partition(".")[2]] = value_of(name[2:], [value])
        return left, fields

    def _check_flags(self, words: Sequence[str]) -> None:
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"unknown flag {flag}{nearest('--' + flag[2:].replace('-', '_'), known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_among(str(value), map(str, action.choices)))

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (`{self.prog} --help` shows all)")


def argument(metavar: str, help: str, **options: Any) -> Any:
    """A positional argument, shown as METAVAR; `options` are argparse's (nargs)."""
    default = None if options.get("nargs") == "?" else dataclasses.MISSING
    return dataclasses.field(default=default, metadata={"metavar": metavar, "help": help, **options})


def flag(help: str, default: Any = None, *, name: str | None = None, one_of: str | None = None, **options: Any) -> Any:
    """A flag.

    Args:
        name: of the flag, where it is another than the field's.
        one_of: exactly one of the flags with this word is given.
        options: argparse's (metavar, nargs, required, action).
    """
    metadata = {"help": help, "flag": name, "one_of": one_of, **options}
    return dataclasses.field(default=default, metadata=metadata)


def shared(add: Callable[[argparse.ArgumentParser], None], read: Callable[[argparse.Namespace], Any]) -> Any:
    """Flags that several requests share: `add` puts them into a parser, `read` makes the field's value."""
    return dataclasses.field(metadata={"add": add, "read": read})


@dataclasses.dataclass(frozen=True)
class Action:
    """One of the actions of a verb such as `store`: its line of help, its request and what runs it."""

    help: str
    request: type[Any]
    run: Callable[[Any], None]


def add_actions(parser: Parser, actions: Mapping[str, Action]) -> None:
    """Give a parser a sub-command for each action."""
    names = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action in actions.items():
        add_request(names.add_parser(name, help=action.help), action.request, action.run)


def add_request(parser: argparse.ArgumentParser, request: type[T], run: Callable[[T], None]) -> None:
    """Give a parser the arguments of a request; its `run` takes what was parsed, and calls `run` with the request."""
    hints = typing.get_type_hints(request)
    groups: dict[str, Any] = {}
    for one in dataclasses.fields(request):  # type: ignore[arg-type]
        options = dict(one.metadata)
        if "add" in options:
            options["add"](parser)
            continue
        positional = "flag" not in options
        name, group = options.pop("flag", None), options.pop("one_of", None)
        of_type = _value_type(hints[one.name])
        if of_type is bool:
            options["action"] = "store_true"
        elif typing.get_origin(of_type) is Literal:
            options["choices"] = typing.get_args(of_type)
        elif of_type is not str:
            options["type"] = of_type
        of_path = of_type in (str, Path) and "choices" not in options
        if positional:
            _complete(parser.add_argument(one.name, **options), of_path)
            continue
        if of_type is not bool:
            options["default"] = one.default
        if group and group not in groups:
            groups[group] = parser.add_mutually_exclusive_group(required=True)
        target = groups[group] if group else parser
        _complete(target.add_argument(f"--{name or one.name}", dest=one.name, **options), of_path)
    parser.set_defaults(run=lambda arguments: run(_read(request, arguments)))


def _complete(action: argparse.Action, of_path: bool) -> None:
    """A shell completes files where text is expected: a script of shtab's leaves nothing to the shell's own way."""
    if of_path:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _read(request: type[T], arguments: argparse.Namespace) -> T:
    values = {}
    for one in dataclasses.fields(request):  # type: ignore[arg-type]
        value = one.metadata["read"](arguments) if "read" in one.metadata else getattr(arguments, one.name)
        values[one.name] = tuple(value) if isinstance(value, list) else value
    return request(**values)


def _value_type(hint: Any) -> Any:
    """The type of one value: `X | None` and `tuple[X, ...]` => X."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = [one for one in typing.get_args(hint) if one is not type(None)]
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
