"""Help of a config (`--help`): its options with their values, and every kind that one of them may be."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

from ldm_vae.core.config import Options, Part, Section, options
from ldm_vae.core.text import first_sentence

WIDEST = 120  # columns; a pipe has 80


def show(config: Section, program: str) -> typing.NoReturn:
    """Print the options of a config and leave the program, as `--help` does."""
    import tyro  # 0.2 s, for the help text alone

    keep = (tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff)
    with contextlib.redirect_stdout(getattr(sys.stdout, "raw", sys.stdout)):  # its colours are meant
        try:
            tyro.cli(
                type(config), default=config, args=["--help"], prog=program or None, config=keep, use_underscores=True
            )
        finally:
            print(f"\n{kinds(type(config))}")
    raise SystemExit(0)


def kinds(section: type[Section]) -> str:
    """Every kind of every option of a config, with its first sentence and the names of its fields."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    opening = (
        "Kinds of options. `--KEY.kind NAME` takes one, and `--help` behind that shows its fields with their values; a "
        "dotted NAME is a module of yours."
    )
    return "\n".join([*textwrap.wrap(opening, width), *_listed(section, "", width, {})])


def _listed(section: type[Section], above: str, width: int, said: dict[object, str]) -> Iterator[str]:
    """The options of a section and, behind them, those within; `said`: those that were listed, with their keys."""
    for name, field in section.model_fields.items():
        inner = [field.annotation, *typing.get_args(field.annotation), *field.metadata]
        found = [*inner, *(one for annotated in inner for one in getattr(annotated, "__metadata__", ()))]
        key = f"{above}{name}"
        for one in found:
            if isinstance(one, Options):
                yield from _of_package(one, f"{key}.NAME" if one.named else key, width, said)
            elif isinstance(one, type) and issubclass(one, Section) and not issubclass(one, Part):
                yield from _of_section(one, key, width, said)


def _of_package(found: Options, key: str, width: int, said: dict[object, str]) -> Iterator[str]:
    if found in said:
        yield f"\n{key}.kind: as {said[found]}.kind"
        return
    said[found] = key
    yield f"\n{key}.kind" + (": the kind of NAME, unless it says another" if found.named else "")
    parts = []
    for kind in options(found.package):
        parts.append(importlib.import_module(f"{found.package}.{kind}").Config)
        yield from _described(kind, first_sentence(_docstring(f"{found.package}.{kind}")), parts[-1], width)
    for part in parts:
        yield from _listed(part, f"{key}.", width, said)


def _of_section(section: type[Section], key: str, width: int, said: dict[object, str]) -> Iterator[str]:
    if section in said:
        return
    said[section] = key
    kind = section.model_fields.get("kind")
    if kind is not None and typing.get_origin(kind.annotation) is typing.Literal:
        yield f"\n{key}.kind"
        names = ", ".join(map(str, typing.get_args(kind.annotation)))
        yield from _described(names, first_sentence(kind.description or ""), section, width)
    yield from _listed(section, f"{key}.", width, said)


def _described(kind: str, sentence: str, section: type[Section], width: int) -> Iterator[str]:
    fields = ", ".join(name for name in section.model_fields if name != "kind")
    said = f"{sentence} [{fields}]" if fields else sentence
    head = f"  {kind:<16}  "
    if len(head) > 20:
        yield head.rstrip()
        head = " " * 20
    yield from textwrap.wrap(
        said, width, initial_indent=head, subsequent_indent=" " * 20, break_long_words=False, break_on_hyphens=False
    )


def _docstring(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
