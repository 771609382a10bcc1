"""The two ways a program ends badly, and the exit status of each: one sentence on stderr, never a traceback.

0 done; 1 the work failed; 2 the call was wrong; 130 / 143 stopped by SIGINT / SIGTERM after saving.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UsageError(ValueError):
    """The call was wrong: the sentence names the argument or field, what was expected, what came and what exists."""


class WorkError(RuntimeError):
    """The call was right and the work failed: the sentence says what happened and what is left."""


class Stopped(SystemExit):
    """SIGTERM or SIGINT arrived, the state was saved; the exit status says which (143 or 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a program's `main` and exit with the status that its outcome stands for."""
    try:
        main()
    except UsageError as error:
        _leave(2, error)
    except WorkError as error:
        _leave(1, error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _leave(status: int, error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)
