"""Text of files: what its bytes say, and its lines."""

from __future__ import annotations

import codecs

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(data: bytes) -> str:
    """Bytes as text: UTF-16 where they begin with its mark (BOM), else UTF-8, with a mark or without; the mark is no
    part of it.

    Raises:
        ValueError: it is neither, or holds a NUL (UTF-16 without a mark, or no text).
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, or UTF-16 with its mark (BOM); byte {error.start} is neither") from error
    if "\0" in text:
        raise ValueError("expected UTF-8, or UTF-16 with its mark (BOM); it holds zero bytes")
    return text


def lines(text: str) -> list[str]:
    """The lines of JSONL or of a list. `str.splitlines` would split at U+0085 and U+2028 too, which a name may hold."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
