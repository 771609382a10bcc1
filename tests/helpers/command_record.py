"""tests/docs_commands.md: which shell commands of the documents have been run, and why the others have not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from documents import all_commands
from repository import ROOT

PATH = ROOT / "tests" / "docs_commands.md"
TITLES = ("| command | appended | seconds | date |", "| command | why not here | last run |")
RULES = ("|---|---|---:|---|", "|---|---|---|")


def _cells(row: str) -> list[str]:
    return [cell.strip().replace("\0", "|") for cell in row.replace("\\|", "\0").strip("|").split("|")]


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


@dataclass
class Record:
    """The page: its words, and the rows of its two tables by command."""

    words: list[str]
    """Text before the first table, between the two, and after the second."""
    run: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    not_run: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        return {*self.run, *self.not_run}

    @classmethod
    def read(cls) -> Record:
        text = PATH.read_text(encoding="utf-8")
        found = cls([])
        for title, table in zip(TITLES, (found.run, found.not_run), strict=True):
            before, _, text = text.partition(title + "\n")
            found.words.append(before)
            lines = text.splitlines(keepends=True)
            count = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
            for row in lines[1:count]:
                command, *rest = (re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in _cells(row.rstrip("\n")))
                table[command] = tuple(rest)  # type: ignore[assignment]
            text = "".join(lines[count:])
        found.words.append(text)
        return found

    def ran(self, command: str, appended: str, seconds: float, date: str) -> None:
        """Note a success."""
        self.run[command] = (appended, f"{seconds:.1f}", date)

    def write(self) -> None:
        """In the order of the documents, without commands that are in none of them any more."""
        order = dict.fromkeys(command.text for command in all_commands())
        run = [
            f"| {_code(one)} | {_code(a)} | {s} | {d} |"
            for one in order
            if one in self.run
            for a, s, d in [self.run[one]]
        ]
        not_run = [f"| {_code(one)} | {' | '.join(row)} |" for one, row in self.not_run.items()]
        text = ""
        for words, title, rule, rows in zip(self.words, TITLES, RULES, (run, not_run), strict=False):
            text += words + "\n".join([title, rule, *rows]) + "\n"
        PATH.write_text(text + self.words[2], encoding="utf-8")
