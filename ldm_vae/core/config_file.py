"""Configuration files: YAML of plain data, bounded, with what it includes merged in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_text
from ldm_vae.core.programs import find_shipped

MOST_FILES = 64  # that a config consists of
MOST_BYTES = 2**20  # of each
LARGEST_CONFIG = 10_000  # values; what an alias stands for counts wherever the alias stands


def read_yaml(path: Path, within: tuple[Path, ...] = (), read: list[Path] | None = None) -> dict[str, Any]:
    """A YAML file as a dict; `include: other` (one or a list; a file beside this one, else the name of a config that
    ships with the project) is merged in first.

    Only plain data is read: a tag that names a Python object is refused, as are aliases that stand for more than
    LARGEST_CONFIG values (a few lines can for 10^9), a key that is there twice, and more than MOST_FILES in all.
    `within`: the files that include this one; `read`: those read so far.
    """
    if not path.is_file():
        raise UsageError(f"config {path}: no such file")
    if path.resolve() in within:
        raise UsageError(f"config {path}: includes itself")
    within = (*within, path.resolve())
    read = [] if read is None else read
    read.append(path)
    if len(read) > MOST_FILES:
        raise UsageError(f"config {path}: include: expected at most {MOST_FILES} files, one by one and repeated")
    try:
        raw = yaml.load(read_text(path, MOST_BYTES), _PlainLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UsageError(f"config {path}: not readable as YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"config {path}: expected a mapping of sections, got {type(raw).__name__}")
    for key in raw:
        if not isinstance(key, str):
            raise UsageError(f"config {path}: `{key}`: expected the name of a section, got {type(key).__name__}")
    included = raw.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"config {path}: include: expected a file or a list of files, got {str(included)[:40]}")
    merged: dict[str, Any] = {}
    for other in names:
        # later includes win over earlier ones, and the file itself over all
        beside = path.parent / other
        found = beside if beside.is_file() else find_shipped(other) or beside
        merged = merge(merged, read_yaml(found, within, read))
    return merge(merged, raw)


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `above` laid over that of `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        # another `kind` is another option: nothing of the one below it carries over
        if both and value.get("kind", merged[key].get("kind")) == merged[key].get("kind"):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


class _PlainLoader(yaml.SafeLoader):
    """YAML whose size is looked at before anything is built from it."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > LARGEST_CONFIG:
            raise yaml.YAMLError(f"more than {LARGEST_CONFIG:,} values, aliases written out")
        return node


def _count_values(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    if node in known:
        count = known[node]
        if count is None:
            raise yaml.YAMLError("an alias stands inside of what it stands for")
        return count
    # while its parts are being counted: an alias that comes back to it has no end
    known[node] = None
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    inner = itertools.chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in parts)
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: half of a character (a lone surrogate)")
    known[node] = count = 1 + sum(_count_values(part, known) for part in inner)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """Raises YAMLError for a key that is there twice, of which YAML's loader takes the last."""
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in lines:
            raise yaml.YAMLError(f"line {line}: `{key.value}` is there twice, first in line {lines[name]}")
        lines[name] = line
