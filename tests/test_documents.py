"""The documents: each link, anchor, picture and named file exists; each shell command was run, or says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_record import Record
from documents import CONFIGS, PAGES, all_commands, anchors_of, commands_of, links_of
from repository import ROOT

import ldm_vae

NAMED = re.compile(r"`((?:ldm_vae|train|eval|tests|configs|docs)/[\w./-]*)`|\b(docs/\w+\.(?:md|ipynb))\b")
NEW = "ldm_vae/losses/tv.py"  # the file that the README's reader writes
CODE = [path for part in ("ldm_vae", "train", "eval", "tests") for path in sorted((ROOT / part).rglob("*.py"))]
LAST = re.compile(r"\d{4}-\d{2}-\d{2}, \w|never|at every change|by CI|no command")
PAGE = """```
$ ldm-vae a b \\
    --c    # of it
said this
    make x
A=1 python -m y
```
| `ldm-vae z \\| w` | `ldm-vae q` | run `ldm-vae no cell` |
```python
ldm-vae = train (1)
```
`make z` and ldm-vae in prose
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def broken_links(page: Path, text: str) -> list[str]:
    """Links within the repository that lead nowhere."""
    found = []
    for target, _ in links_of(text):
        file, _, anchor = target.partition("#")
        place = page.parent / file
        if re.match(r"https?:", target):
            continue
        dead = not place.exists()
        if not dead and anchor:
            dead = anchor not in anchors_of(place.read_text(encoding="utf-8") if file else text)
        if dead:
            found.append(f"{page.name}: {target}")
    return found


def test_links_and_anchors_lead_somewhere() -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert sum(len(links_of(text)) for text in pages.values()) > 100
    assert [broken for page, text in pages.items() for broken in broken_links(page, text)] == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("## A `b` of [c](README.md), d_e!\n[x](#a-b-of-c-d_e)", []),
        ("## A\n## A\n[x](#a-1) [y](#a-2)", ["#a-2"]),
        ("```\n# No heading\n```\n[x](#no-heading)", ["#no-heading"]),
        ("[x](docs/training.md#fine-tuning) [y](docs/training.md#no) [z](no.md)", ["docs/training.md#no", "no.md"]),
        ("`[x](no.md)` and ![a [b] c](no.png)", ["no.png"]),
    ],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_seen(text: str, broken: list[str]) -> None:
    assert broken_links(ROOT / "README.md", text) == [f"README.md: {target}" for target in broken]


def test_pictures_are_shown_and_described() -> None:
    pictures = {path.resolve() for path in (ROOT / "docs" / "images").iterdir()}
    links = [(page, target) for page in PAGES for target, shown in links_of(page.read_text(encoding="utf-8")) if shown]
    assert {(page.parent / target).resolve() for page, target in links} == pictures
    undescribed = [page.name for page in PAGES if "![](" in page.read_text(encoding="utf-8")]
    assert undescribed == []


def test_files_that_are_named_exist() -> None:
    """In pages, in headers of configs and, of documents, in docstrings and comments."""
    named = [
        (path, file or document)
        for path in [*PAGES, *CONFIGS, *CODE]
        for file, document in NAMED.findall(path.read_text(encoding="utf-8"))
        if document or path.suffix == ".md"
    ]
    named += [
        (path, file)
        for path in CONFIGS
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
        for file in re.findall(r"[\w/]+\.(?:md|yaml|py)\b", line)
    ]
    assert len(named) > 100
    absent = [
        f"{name_of(path)}: {file}"
        for path, file in named
        if file != NEW and not any((place / file).exists() for place in (ROOT, ROOT / "configs"))
    ]
    assert absent == []


def test_each_command_was_run_or_says_why_not() -> None:
    commands = {command.text for command in all_commands()}
    record = Record.read()
    assert len(commands) > 100
    assert sorted(commands - record.known) == [], "run them: python -m tests.docs_commands --new"
    assert sorted({*record.not_run} - commands) == [] and sorted({*record.run} - commands) == []
    assert not record.run.keys() & record.not_run.keys()
    assert [one for one, row in record.run.items() if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", row[2])] == []
    assert [one for one, (why, last) in record.not_run.items() if not (why and LAST.search(last))] == []


def test_commands_are_found_wherever_a_page_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("documents.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = [(one.line, one.text) for one in commands_of(page)]
    assert found == [(2, "ldm-vae a b --c"), (5, "make x"), (6, "A=1 python -m y"), (8, "ldm-vae z | w")]
    config = tmp_path / "one.yaml"
    config.write_text(
        "# A thing.\n# command:  ldm-vae train a && \\\n#               ldm-vae b\n\na: 1  # ldm-vae c d\n"
    )
    assert [one.text for one in commands_of(config)] == ["ldm-vae train a && ldm-vae b"]


@pytest.mark.slow
def test_the_site_is_built_and_asks_nothing_of_other_hosts(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("[a-z]*.md")} < pages.keys()
    loaded = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:|//)|<link\b[^>]*\bhref="(https?:|//)')
    assert [name for name, text in pages.items() if loaded.search(text)] == []
    # the one script that has such addresses, for diagrams and a forge's stars, is given neither
    assert not any("mermaid" in text or 'data-md-component="source"' in text for text in pages.values())
    assert all(f'id="ldm_vae.{home}.{name}"' in pages["reference.html"] for name, home in ldm_vae._HOMES.items())
    assert pages["tutorial.html"].count('src="images/tutorial_') == 4


def test_the_record_is_written_as_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (ROOT / "tests" / "docs_commands.md").read_text(encoding="utf-8")
    monkeypatch.setattr("command_record.PATH", tmp_path / "record.md")
    (tmp_path / "record.md").write_text(before, encoding="utf-8")
    record = Record.read()
    record.write()
    assert (tmp_path / "record.md").read_text(encoding="utf-8") == before
    assert all(text.count("`") % 2 == 0 for row in record.not_run.values() for text in row)
    command = next(iter(record.run))
    record.ran(command, "--short", 1.25, "2026-01-01")
    record.write()
    assert Record.read().run[command] == ("--short", "1.2", "2026-01-01")
