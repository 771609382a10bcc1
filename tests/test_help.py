"""What `--help` of every command and program prints: every kind of every option, and nothing of the source."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from cli_call import call, program
from repository import ROOT

from ldm_vae.cli import parser
from ldm_vae.core import config_help
from ldm_vae.core.config import Section, options
from ldm_vae.core.request import Parser
from ldm_vae.core.text import first_sentence
from ldm_vae.diffusion.config import DiffusionTraining
from ldm_vae.prior.config import PriorTraining
from ldm_vae.training.config import Training
from train import autoencoder, diffusion, prior

WIDTH, HELP_WIDTH = 120, 54  # columns of a page, and of the text beside a flag in 80
LEAKS = re.compile(r"noqa|type: ?ignore|pragma|fmt: ?skip|:param|:class:|``|TODO|FIXME|XXX|\.\. \w+::|==SUPPRESS==")
CUT = re.compile(r"(?:[,;:(]|\b(?:the|a|an|of|and|or))$")  # ends of what goes on


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb and action whose flags are declared here."""
    waiting: list[tuple[str, argparse.ArgumentParser]] = [("ldm-vae", parser())]
    while waiting:
        words, one = waiting.pop()
        if "-" in one.prefix_chars:  # else everything behind the verb is the program's
            yield words, one
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{words} {name}", inner) for name, inner in action.choices.items()]


def programs() -> list[str]:
    """The programs of eval that take arguments."""
    files = [*ROOT.glob("eval/*.py"), ROOT / "eval" / "speed" / "__main__.py"]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if _has_parser(path))


def _has_parser(path: Path) -> bool:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return any(isinstance(one, ast.Name) and one.id == "Parser" for one in calls)


def printed(show: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        show()
    return capsys.readouterr().out


def check_page(text: str, what: str) -> None:
    assert not LEAKS.search(text), (what, LEAKS.search(text))
    assert text.count("`") % 2 == 0, what
    assert [line for line in text.splitlines() if len(line) > WIDTH] == [], what


def check_flags(one: argparse.ArgumentParser, what: str) -> None:
    """Each flag has a whole sentence, none of whose words would be broken."""
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = [choice.help or "" for choice in action._choices_actions]
        else:
            said = [(action.help or "").replace("%(prog)s", "")]
        for sentence in said:
            where = (what, action.dest, sentence)
            assert sentence and not CUT.search(sentence.strip()), where
            assert is_balanced(sentence), where
            assert max(map(len, sentence.split())) <= HELP_WIDTH, where


def is_balanced(sentence: str) -> bool:
    """Brackets and backticks close, those of half-open intervals aside."""
    sentence = re.sub(r"\[[^][()]*\)", "", sentence)
    return sentence.count("(") == sentence.count(")") and sentence.count("`") % 2 == 0


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_of_every_verb() -> None:
    seen = dict(parsers())
    assert {"ldm-vae", "ldm-vae encode", "ldm-vae store verify", "ldm-vae fp16 fix"} <= seen.keys()
    for what, one in seen.items():
        check_page(one.format_help(), what)
        check_flags(one, what)


def test_of_every_program_of_eval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.ArgumentParser] = []
    show = Parser.print_help
    monkeypatch.setattr(Parser, "print_help", lambda self, file=None: (seen.append(self), show(self, file)))
    names = programs()
    assert {"eval.reconstruction", "eval.latent_space", "eval.diffusability"} <= {*names}
    for name in names:
        check_page(printed(lambda name=name: program(importlib.import_module(name), "--help"), capsys), name)
        check_flags(seen[-1], name)
    assert len(seen) == len(names)


@pytest.mark.parametrize(
    ("module", "section", "config", "packages"),
    [
        (autoencoder, Training, "demo",
         ("models", "quantizers", "losses", "perturbations", "discriminators", "data.sources")),
        (diffusion, DiffusionTraining, "diffusion/demo", ("denoisers",)),
        (prior, PriorTraining, "prior/demo", ("priors",)),
    ],
)  # fmt: skip
def test_of_the_trainings(
    module: ModuleType,
    section: type[Section],
    config: str,
    packages: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "configs" / f"{config}.yaml"
    alone, of_config = (
        printed(lambda words=words: program(module, *words), capsys) for words in (["--help"], [path, "--help"])
    )
    for text in (alone, of_config):
        check_page(text, config)
        for package in packages:
            for kind in options(f"ldm_vae.{package}"):
                assert re.search(rf"^  {kind}( |$)", text, re.M), (package, kind)
    assert re.search(r"^  linear, cosine, cyclic$", alone, re.M) or module is not autoencoder  # of schedules
    for name, field in section.model_fields.items():  # the file's options, with their values
        assert f"--{name}" in of_config or field.default is None or name in ("losses", "perturbations"), name
    assert "--gradient_checkpointing" in of_config and "--gradient-checkpointing" not in of_config


def test_fields_of_a_kind_are_shown_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = [ROOT / "configs" / "demo.yaml", "--discriminator.kind", "features", "--help"]
    text = printed(lambda: program(autoencoder, *words), capsys)
    assert "--discriminator.backbone" in text and "--discriminator.width" not in text


class Remarked(Section):
    side: int = 3  # a remark for those who read the source
    steps: int = 4
    """So many that the sentence
    goes on."""


def test_a_remark_in_the_source_is_no_help_and_a_sentence_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(lambda: config_help.show(Remarked(), "do"), capsys)
    assert "--side" in text and "remark" not in text
    assert "So many that the sentence goes on." in text


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Short.", "Short."),
        ("Two\nlines of it. And more.", "Two lines of it."),
        ("After Guo et al. 2022, eq. 3: so. Then `x`.", "After Guo et al. 2022, eq. 3: so."),
        ("Of f = 1.5 px. `make demo` is next.", "Of f = 1.5 px."),
        ("No end\n\nAnother paragraph.", "No end"),
    ],
)
def test_the_first_sentence_is_whole(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_every_field_of_a_config_has_whole_sentences() -> None:
    sections: list[type[Section]] = [Section]
    for one in sections:
        sections += [sub for sub in one.__subclasses__() if sub.__module__.startswith("ldm_vae.")]
    assert len(sections) > 60
    for one in sections:
        for name, field in one.model_fields.items():
            said = field.description or ""
            assert "\n" not in said and is_balanced(said) and not CUT.search(said), (one, name, said)


def test_the_list_of_configs_has_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(lambda: call("config"), capsys)
    entries = re.findall(r"^(\S+)\n((?:    .+\n)+)", text, re.M)
    assert {"demo", "kl_f8_d4", "diffusion/demo", "prior/demo"} <= {name for name, _ in entries}
    for name, sentence in entries:
        assert sentence.rstrip().endswith(".") and not CUT.search(sentence.rstrip().rstrip(".")), name
        header = (ROOT / "configs" / f"{name}.yaml").read_text()
        assert " ".join(sentence.split()) in " ".join(header.replace("\n# ", " ").removeprefix("# ").split())
    assert max(map(len, text.splitlines())) <= 80
