"""The repository's documents: their headings, links, pictures and shell commands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

PAGES = [ROOT / "README.md", *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PROGRAMS = ("ldm-vae", "accelerate", "python", "pytest", "make", "pip", "git")
STARTS = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) ")
SHELL = ("", "sh", "bash", "console")  # languages of a fence that may hold commands


def lines_of(text: str) -> Iterator[tuple[int, str, str | None]]:
    """(number, line, language of the fence around it or None) of a page; the fences themselves are left out."""
    fence: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        else:
            yield number, line, fence


def prose_of(text: str) -> str:
    """The page without its code."""
    kept = (line for _, line, fence in lines_of(text) if fence is None and not line.startswith("    "))
    return re.sub(r"`[^`\n]*`", "``", "\n".join(kept))


def links_of(text: str) -> list[tuple[str, bool]]:
    """(target, whether it is a picture) of every link of a page."""
    return [(target, bool(mark)) for mark, target in LINK.findall(prose_of(text))]


def slug_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors_of(text: str) -> set[str]:
    """Anchors of a page's headings: the second of a name ends in -1."""
    seen: Counter[str] = Counter()
    found = set()
    for _, line, fence in lines_of(text):
        if fence is None and (heading := re.match(r"#{1,6} (.*)", line)):
            slug = slug_of(heading[1])
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


@dataclass(frozen=True)
class Command:
    """A shell command of a page: its text without comment, on one line."""

    page: str
    line: int
    """Line of the page where it begins."""
    block: int
    """Line where the code around it begins: commands of one block are run one after the other."""
    text: str


def _joined(lines: list[tuple[int, int, str]], page: str) -> list[Command]:
    """Commands among lines (number, block, text) of code: a backslash joins, a comment ends."""
    found: list[Command] = []
    rest: tuple[int, int, str] | None = None
    for number, block, line in lines:
        words = re.sub(r"(^|\s{2,})# .*$", "", line).strip()
        if rest is not None:
            number, block, words = rest[0], rest[1], f"{rest[2]} {words}"
        rest = None
        if not STARTS.match(words + " "):
            continue
        if words.endswith("\\"):
            rest = (number, block, words[:-1].rstrip())
        else:
            found.append(Command(page, number, block, " ".join(words.removeprefix("$ ").split())))
    return found


def commands_of(path: Path) -> list[Command]:
    """Shell commands of a page, in fences, indented, or alone in a table's cell; of a config, those of its header."""
    page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    code: list[tuple[int, int, str]] = []
    if path.suffix == ".yaml":
        # the opening comment: `command:` and what is indented behind it, or the bare command of a launcher's config
        header = [line[1:].strip() for line in text.split("\n\n", 1)[0].splitlines() if line.startswith("#")]
        code = [(number, 1, line.removeprefix("command:").strip()) for number, line in enumerate(header, 1)]
    else:
        block, before = 0, 0
        for number, line, fence in lines_of(text):
            if fence is None and line.startswith("|"):
                cells = re.findall(r"(?<=\|)\s*`((?:[^`\n])*)`\s*(?=\|)", line)
                # a name of a program in a cell, `ldm-vae drift`, is no call
                code += [(number, number, cell.replace("\\|", "|")) for cell in cells if cell.count(" ") > 1]
            elif (fence is None and line.startswith("    ")) or (fence in SHELL and fence is not None):
                block = block if number == before + 1 else number
                before = number
                code.append((number, block, line))
    return _joined(code, page)


def all_commands() -> list[Command]:
    return [command for path in [*PAGES, *CONFIGS] for command in commands_of(path)]
