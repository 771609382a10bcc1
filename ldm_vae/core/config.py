"""The configuration mechanism: YAML file -> typed sections -> command-line overrides. It holds no knobs of its own.

Each section is declared in the file that uses it; a program composes them. The file is the record, flags only override:

    config = load(Training, "configs/demo.yaml", ["--losses.kl.weight", "1e-5"])

An option among several (`discriminator: {kind: patchgan}`) is a `choice(package)`: `kind` is the file name of the
option in that package, or a dotted path to the user's own module. The module holds a class `Config(Part)`, whose
`build` makes the thing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ldm_vae.core import overrides
from ldm_vae.core.config_file import merge, read_yaml
from ldm_vae.core.errors import UsageError
from ldm_vae.core.numbers import LARGEST
from ldm_vae.core.text import nearest, not_among
from ldm_vae.core.validation import first_line

_SCALARS = (bool, int, float, str, Path)
SectionType = TypeVar("SectionType", bound="Section")


class Section(BaseModel):
    """A group of knobs: immutable, and a key it does not know is an error. Field docstrings become the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        for field in cls.model_fields.values():  # docstrings are wrapped for the source and not for the help
            field.description = field.description and " ".join(field.description.split())

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        """Text where a list is expected is a list of one, as on a command line. Raises ValueError for several values
        where one is expected, which pydantic would say by the type of that one."""
        kind = cls.model_fields[str(info.field_name)].annotation
        union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        kinds = [one for one in typing.get_args(kind) if one is not types.NoneType] if union else [kind]
        listed = all(typing.get_origin(one) in (list, tuple) for one in kinds)
        single = all(one in _SCALARS or typing.get_origin(one) is typing.Literal for one in kinds)
        if single and isinstance(value, list):
            raise ValueError(f"expected one value, got {len(value)}: {', '.join(map(str, value))}")
        return [value] if listed and isinstance(value, str) else value

    @field_validator("*")
    @classmethod
    def _possible(cls, value: Any) -> Any:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and abs(one) > LARGEST:
                raise ValueError(f"expected at most 2^53, got a number of {len(str(abs(int(one))))} digits")
            if isinstance(one, str | Path) and "\0" in str(one):
                raise ValueError("expected text without the character NUL")
        return value


class Part(Section):
    """A section that is one option among several; `kind` says which, `build` makes the thing."""

    kind: str

    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__module__}.Config has no build")

    def outline(self, *args: Any, **kwargs: Any) -> Any:
        """The same thing without weights that would have to be loaded: for counting its cost."""
        return self.build(*args, **kwargs)


@dataclass(frozen=True)
class Options:
    """Marks a field that takes one option of a package, or several by name."""

    package: str
    named: bool = False


def options(package: str) -> list[str]:
    """The options of a package: one file each, the file name is the name."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


class _NestedError(ValueError):
    """A complaint below the field that pydantic blames: the path from there on, and the sentence."""

    def __init__(self, path: Sequence[int | str], sentence: str) -> None:
        super().__init__(sentence)
        self.path = tuple(path)


def _part(package: str, value: Any, default: str | None = None) -> Any:
    if not isinstance(value, Mapping):
        return value
    # an option's fields are known only once its module is imported, so pydantic's own unions do not serve
    kind = value.get("kind", default)
    exist = options(package)
    if not isinstance(kind, str):
        raise ValueError(f"`kind` is missing; expected one of {', '.join(exist)}, or a dotted path to your module")
    if "." in kind and not all(name.isidentifier() for name in kind.split(".")):
        raise ValueError(f"kind `{kind}`: expected one of {', '.join(exist)}, or a dotted path to your module")
    # a dotted path is the user's own module, a plain name one of ours
    if "." not in kind and kind not in exist:
        raise ValueError(f"unknown kind `{kind}`; {package} has {', '.join(exist)}{nearest(kind, exist)}")
    try:
        module = import_own(kind) if "." in kind else importlib.import_module(f"{package}.{kind}")
    except ImportError as error:
        raise ValueError(f"kind `{kind}` cannot be imported: {error}") from error
    part = getattr(module, "Config", None)
    if not (isinstance(part, type) and issubclass(part, Part)):
        raise ValueError(f"kind `{kind}`: the module has no class `Config(ldm_vae.core.config.Part)`")
    # a Literal there fixes the name, by which a copied module would refuse its own path
    names = typing.get_args(part.model_fields["kind"].annotation)
    if names and kind not in names:
        raise ValueError(
            f"kind `{kind}`: its Config fixes `kind` as {names[0]!r}; in a module of yours it is `kind: str`"
        )
    try:
        return part.model_validate(dict(value))
    except ValidationError as error:
        raise _NestedError(*_first_problem(part, error)) from error


def import_own(path: str) -> types.ModuleType:
    """Import a module of the user's own by its dotted path: one that is installed, else one of the current folder.

    Raises:
        ImportError: there is none, or it fails in any way at all.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: nothing that lies there stands in for something installed
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no output of the program
            return importlib.import_module(path)
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ImportError(f"{type(error).__name__}: {first_line(error)}") from error


def choice(package: str, default: str | None = None) -> Any:
    """The type of a field that takes one option of `package`; `default` is the kind where none is named."""
    reading = BeforeValidator(lambda value: _part(package, value, default))
    return Annotated[SerializeAsAny[Part], reading, Options(package)]


def choices(package: str) -> Any:
    """The type of a field that maps names to options of `package`; a name is the default of its `kind`, and null leaves
    out what an included file has under that name."""

    def validate(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = {}
        for name, part in value.items():
            if part is None:
                continue
            try:
                named[name] = _part(package, {"kind": name, **part} if isinstance(part, Mapping) else part)
            except _NestedError as error:
                raise _NestedError((name, *error.path), str(error)) from error
            except ValueError as error:
                raise _NestedError((name,), str(error)) from error
        return named

    return Annotated[dict[str, SerializeAsAny[Part]], BeforeValidator(validate), Options(package, named=True)]


# --- file => sections -------------------------------------------------------------------------------------------------


def load(section: type[SectionType], path: str | Path, flags: Sequence[str] = ()) -> SectionType:
    """Read a YAML file into `section` and apply command-line overrides such as `--losses.kl.weight 1e-5`.

    Raises:
        UsageError: one sentence that names the field, what was expected, what came and what exists.
    """
    given = overrides.parse(flags)
    raw = read_yaml(Path(path))
    try:
        config = section.model_validate(merge(raw, overrides.tree(given)))
    except ValidationError as error:
        raise UsageError(_blame(section, error, raw, f"config {path}", given)) from error
    return config


def validate(section: type[SectionType], raw: object, source: str) -> SectionType:
    """Check a tree of JSON or YAML against `section`; `source` names where it came from in the error.

    Raises:
        UsageError: one sentence that names the field.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(section, error)}") from error


def dump(config: Section) -> str:
    """The resolved config as YAML that `load` reads back to an equal config."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def differences(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with its (old, new) value."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flatten(config: Section) -> dict[str, Any]:
    """Dotted keys and their plain values."""
    return _flatten(config.model_dump(mode="json"))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


# --- errors -----------------------------------------------------------------------------------------------------------


def _explain(section: type[Section], error: ValidationError) -> str:
    """One sentence for the first of pydantic's complaints, and how many more there are."""
    path, sentence = _first_problem(section, error)
    more = len(error.errors()) - 1
    where = f"`{'.'.join(map(str, path))}`: " if path else ""  # what several fields have to agree on names them
    return where + sentence + (f" (and {more} more)" if more else "")


def _blame(
    section: type[Section], error: ValidationError, raw: Mapping[str, Any], source: str, given: Mapping[str, Any]
) -> str:
    """The sentence of `_explain`, on the flag where one brought the value in."""
    path, sentence = _first_problem(section, error)
    dotted = ".".join(map(str, path))
    # of a list the flag is named and not its second number, of a section what was changed in it
    flags = [name for name in given if f"{dotted}.".startswith(f"{name}.") or name.startswith(f"{dotted}.")]
    if not flags:
        return f"{source}: {_explain(section, error)}"
    if not sentence.startswith("unknown key"):
        return f"options: {', '.join(f'--{flag}' for flag in flags)}: {sentence}"
    flag = flags[0]
    try:
        known = [f"--{name}" for name in flatten(section.model_validate(dict(raw)))]
    except ValidationError:  # the file has another error: what is a key beside that one
        return f"unknown option --{flag}{sentence.removeprefix('unknown key')}"
    return f"unknown option --{flag}{nearest(f'--{flag}', known) or f'; options are {_shorten(known)}'}"


def _first_problem(section: type[Section], error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    first = error.errors()[0]
    path = first["loc"]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _NestedError):
        return (*path, *cause.path), str(cause)
    if first["type"] == "extra_forbidden":
        exist = _fields_at(section, path[:-1])
        return path, f"unknown key{nearest(str(path[-1]), exist)}; this section has {', '.join(exist)}"
    if first["type"] == "missing":
        return path, "is missing"
    if first["type"] == "literal_error":
        words = re.findall(r"'[^']*'|[^\s,']+", first["ctx"]["expected"])  # 'a', 'b' or 'c'
        return path, not_among(str(first["input"]), [word.strip("'") for word in words if word != "or"])
    message = first["msg"].removeprefix("Value error, ")
    came = "" if first["type"] == "value_error" or isinstance(first["input"], Mapping) else f", got {first['input']!r}"
    return path, f"{message[:1].lower()}{message[1:]}{came}"


def _fields_at(section: type[Section], path: Sequence[int | str]) -> list[str]:
    """Names of the fields that exist at `path`, found by walking the declared types."""
    for step in path:
        inner = section.model_fields[str(step)].annotation
        candidates = [inner, *typing.get_args(inner)]  # Section, or Section | None
        section = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section))
    return sorted(section.model_fields)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ... (--help shows all)" if len(names) > 12 else "")
