"""Command-line overrides of a config: `--losses.kl.weight 1e-5` as the tree that the YAML file could have held.

They are merged into the file's tree before anything is validated, so that `--data.kind zip --data.path x.zip` needs no
order, and a value of the wrong type is blamed on its flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ldm_vae.core.errors import UsageError

HELP = ("-h", "--help")


def parse(flags: Sequence[str]) -> dict[str, Any]:
    """Values by dotted name: text, a list of several, True where nothing follows, None for `None`; `[...]` and `{...}`
    are YAML. `--no_x` and `--a.no_x` are False; `-` in a name is `_`.

    Raises:
        UsageError: a value without a flag, a flag twice, or brackets that do not close.
    """
    found: dict[str, Any] = {}
    name = ""
    values: list[str] = []

    def close() -> None:
        if not name:
            return
        if name in found:
            raise UsageError(f"options: --{name} stands twice")
        found[name] = value_of(name, values)

    for token in flags:
        if token.startswith("--") and len(token) > 2:
            close()
            name, equals, value = token[2:].partition("=")
            name, values = name.replace("-", "_"), [value] if equals else []
        elif name:
            values.append(token)
        else:
            raise UsageError(f"options: expected --NAME VALUE, got {token!r}")
    close()
    for dotted in list(found):
        section, _, last = dotted.rpartition(".")
        if found[dotted] is True and last.startswith("no_"):
            found[f"{section}.{last[3:]}".lstrip(".")] = not found.pop(dotted)
    return found


def value_of(name: str, values: Sequence[str]) -> Any:
    """The value that these words behind --NAME mean. Raises UsageError for brackets that do not close."""
    if not values:
        return True
    if len(values) > 1:
        return list(values)
    (value,) = values
    if value.startswith(("[", "{")):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"options: --{name}: expected YAML, got {value!r}") from error
    return None if value in ("None", "null") else value


def tree(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names => nested sections. Raises UsageError where a name is a value and a section."""
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        *above, last = dotted.split(".")
        section = nested
        for at, part in enumerate(above):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UsageError(f"options: --{'.'.join(above[: at + 1])} is given, and --{dotted} below it")
        if isinstance(section.get(last), dict):
            raise UsageError(f"options: --{dotted} is given, and others below it")
        section[last] = value
    return nested
