"""Progress of long work: a bar on a terminal; in a file (nohup, a scheduler's log) a line now and then."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines: 120 an hour, and none of work that is over sooner


class Progress(tqdm):  # type: ignore[type-arg]  # tqdm's own annotations differ by version
    """tqdm whose output, where it is no terminal, is whole lines: what is done, the rate since the last line, the time
    left. Of several processes of a launch the first shows it.

    Args:
        on_report: lines only where `report` asks for one, however long that takes.
        options: tqdm's.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: float | None = None,
        *,
        on_report: bool = False,
        disable: bool = False,
        **options: Any,
    ) -> None:
        self.as_lines = not sys.stderr.isatty()
        disable = disable or os.environ.get("RANK", "0") != "0"
        if self.as_lines:
            wait = math.inf if on_report else LINE_SECONDS
            # each update asks the clock: tqdm's guess of how many go by unseen is made for ten bars a second
            options |= {"mininterval": wait, "maxinterval": wait, "delay": wait, "miniters": 1, "leave": False}
        self._line_n, self._line_time = options.get("initial", 0), time.monotonic()  # the constructor may show it
        super().__init__(iterable, desc, total, disable=disable, **options)

    def report(self, values: Mapping[str, str]) -> None:
        """Show these values behind the bar, or a line with them now."""
        self.set_postfix(values)

    def say(self, sentence: str) -> None:
        """Write a sentence to stderr, above the bar."""
        if self.as_lines:
            print(sentence, file=sys.stderr, flush=True)
        else:
            self.write(sentence, file=sys.stderr)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self.as_lines:
            return super().display(msg, pos)
        if msg is not None:  # an empty one takes a bar away
            return False
        now = time.monotonic()
        print(self._line((self.n - self._line_n) / max(now - self._line_time, 1e-9)), file=self.fp, flush=True)
        self._line_n, self._line_time = self.n, now
        return True

    def _line(self, rate: float) -> str:
        known = self.format_dict
        size = self.format_sizeof if known["unit_scale"] else "{:,.0f}".format
        unit, total, left = known["unit"], known["total"], ""
        done = size(self.n)
        if total:
            done += f" of {size(total)}"
            # by all of this process's work: a validation within this interval says little about the rest
            if (before := self.n - known["initial"]) > 0:
                left = f", {self.format_interval((total - self.n) * known['elapsed'] / before)} left"
        pace = f"{size(rate)}" if known["unit_scale"] or rate >= 100 else f"{rate:.3g}"
        share = f" ({self.n / total:.0%})" if total else ""
        tail = f"; {known['postfix']}" if known["postfix"] else ""
        return f"{known['prefix'] or 'progress'}: {done} {unit}{share}, {pace} {unit}/s{left}{tail}"
