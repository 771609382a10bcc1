"""stdout and stderr of the programs: what a file is called or holds is shown and never obeyed, in any encoding."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, TextIO

# C0 without tab, newline and the carriage return of progress bars; DEL; C1, which 8-bit terminals obey as well
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_UP = re.compile(r"(\x1b\[A)+")  # the one sequence of ours: tqdm writes it by itself, for a bar within a bar


class Shown:
    """A text stream whose control characters come out as `\\x1b`: a terminal would obey those of a file's name."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        shown = text if _UP.fullmatch(text) else _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        self.raw.write(shown)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def prepare() -> None:
    """Make stdout and stderr fit for any text, and open those that were closed (`>&-`), once a process.

    A closed one is /dev/null from then on: its number would go to the next file that is opened, and every message of a
    C library into that file.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            stream = os.fdopen(number, "w")
        if not isinstance(stream, Shown):
            # what ASCII (PYTHONIOENCODING, a bare container) or UTF-8 (a name in Latin-1) has no bytes for
            # and a line is written when it is printed, also into the log of nohup or a scheduler
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, Shown(stream))


def print_note(sentence: str) -> None:
    """Tell a user on stderr, once a launch, about what is taken all the same."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr)
