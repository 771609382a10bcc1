"""metrics.jsonl: one JSON object a line, as `Logbook` writes them and the page and the card read them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from ldm_vae.core.files import LARGEST, read_bytes
from ldm_vae.core.text import lines
from ldm_vae.core.validation import parse_json

MOST_IMAGES = 2**63


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole and say when, of finite numbers and `warnings`; none where there is no file. What is
    something else is left out: a running training may be writing the last line, and anybody may have edited another."""
    return [line for _, line in read_lines(path)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Those lines, each with its text."""
    if not path.is_file():
        return []
    texts = lines(read_bytes(path, LARGEST).decode(errors="replace"))
    return [(text, line) for text in texts if (line := _line(text)) is not None]


def _line(text: str) -> dict[str, Any] | None:
    tree: Any = None
    with contextlib.suppress(ValueError):
        tree = parse_json(text)
    if not isinstance(tree, dict) or not isinstance(seen := tree.get("images"), int) or not 0 <= seen < MOST_IMAGES:
        return None
    said = tree.pop("warnings", {})
    line = {name: value for name, value in tree.items() if _is_number(value)}
    if isinstance(said, dict) and (warnings := {name: text for name, text in said.items() if isinstance(text, str)}):
        line["warnings"] = warnings
    return line


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
