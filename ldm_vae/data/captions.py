"""The caption, whatever a dataset calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rename_caption(columns: Mapping[str, Any], caption_column: str | None) -> dict[str, Any]:
    """The column `caption_column` is called `caption`; a column that was called so becomes `caption_before`."""
    if caption_column in (None, "caption") or caption_column not in columns:
        return dict(columns)
    names = {caption_column: "caption", "caption": "caption_before"}
    return {names.get(name, name): value for name, value in columns.items()}
