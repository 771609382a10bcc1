"""Text: what the bytes of a file say, its lines, and the word that a mistyped one meant."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Callable, Iterable

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


def an(name: str) -> str:
    """A class or kind with its article: `an AutoencoderKL`, `a VQModel`."""
    return f"an {name}" if name[:1] in "AEIOaeio" else f"a {name}"


def nearest(word: str, known: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """`, did you mean X` of the most similar word among `known`, as it is `shown`; nothing where none is similar."""
    close = difflib.get_close_matches(word, [*known], n=1)
    return f", did you mean `{shown(close[0])}`" if close else ""


def not_among(word: str, known: Iterable[str]) -> str:
    """The choices, what came in their place and which of them may have been meant."""
    known = [*known]
    return f"expected one of {', '.join(known)}, got {word}{nearest(word, known)}"


def first_sentence(text: str) -> str:
    """The first sentence of a text, whole, on one line; an `et al. 2022` does not end it."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    found = re.match(r".+?[.!?](?=\s+[A-Z`]|$)", paragraph)
    return found[0] if found else paragraph
