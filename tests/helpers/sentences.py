"""Golden sentences of errors: a test names the error's type and field, `tests/sentences.json` holds what it says.

    with refused(UsageError, "resolution"):
        encode(resolution=33)

    pytest FILES --write-sentences    # rewrites the sentences of the tests that ran and passed; read the diff

What varies from run to run is masked: folders, ports, checksums, versions, floats of four decimals and more.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

MASKS = {
    r"TMP/[^/\s'\"`]*?\d+(?![^/\s'\"`:;,)])": "TMP",  # pytest numbers the folder of a test
    r"(127\.0\.0\.1|localhost):\d+": r"\1:PORT",
    r"\b[0-9a-f]{12,}\b": "HEX",
    r"(?<![\d.])(?!127\.0\.0\.1)\d+\.\d+\.\d+[\w.+]*": "VERSION",
    r"\b\d+\.\d{4,}(e[-+]\d+)?\b": "FLOAT",
}

_said: list[str] = []  # by the test that is running
_fresh: dict[str, list[str]] = {}  # by each test that has passed, masked
_BASE = pytest.StashKey[Path]()
_GOLDEN = pytest.StashKey[dict[str, list[str]]]()


@contextlib.contextmanager
def refused(
    kind: type[Exception] | tuple[type[Exception], ...], field: str
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error of this type whose sentence names `field`, a whole word; its text is in the golden file."""
    with pytest.raises(kind) as error:
        yield error
    assert names(str(error.value), field), f"`{error.value}` does not name `{field}`"
    _said.append(str(error.value))


def names(sentence: str, field: str) -> bool:
    """Whether `field` occurs as a whole word: `vae` is in `--vae` and `data.vae`, not in `ldm-vae` or `vae_folder`."""
    return re.search(rf"(?<!\w)(?<!\w-){re.escape(field)}(?!-?\w)", sentence) is not None


def masked(sentence: str, base: Path, root: Path) -> str:
    """The sentence without what varies from run to run; pytest makes its folders in `base`, `root` is the project."""
    sentence = sentence.replace(str(base), "TMP").replace(str(root), "ROOT")
    for pattern, mask in MASKS.items():
        sentence = re.sub(pattern, mask, sentence)
    return sentence


# --- the plugin -------------------------------------------------------------------------------------------------------


def golden_file(config: pytest.Config) -> Path:
    return config.rootpath / "tests" / "sentences.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-sentences", action="store_true", help="rewrite tests/sentences.json for the tests run")


def pytest_configure(config: pytest.Config) -> None:
    path = golden_file(config)
    config.stash[_GOLDEN] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@pytest.fixture(scope="session", autouse=True)
def _base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    request.config.stash[_BASE] = tmp_path_factory.getbasetemp()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Compare what a test has recorded, or hand it on: a report's properties travel from xdist's workers."""
    _said.clear()
    yield
    said = [masked(sentence, item.config.stash[_BASE], item.config.rootpath) for sentence in _said]
    golden = item.config.stash[_GOLDEN].get(item.nodeid, [])
    if item.config.option.write_sentences:
        item.user_properties.append(("sentences", said))
    elif said != golden:
        was, now = ("".join(f"    {sentence}\n" for sentence in some) or "    nothing\n" for some in (golden, said))
        rewrite = f"if that is meant: pytest {item.nodeid.partition('::')[0]} --write-sentences"
        pytest.fail(f"tests/sentences.json has\n{was}and the test got\n{now}{rewrite}", pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _fresh.update((report.nodeid, said) for name, said in report.user_properties if name == "sentences")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write once, in the process that has heard of all tests."""
    config = session.config
    if config.option.write_sentences and not hasattr(config, "workerinput"):
        sentences = {test: said for test, said in (config.stash[_GOLDEN] | _fresh).items() if said}
        text = json.dumps(sentences, indent=1, sort_keys=True, ensure_ascii=False)
        golden_file(config).write_text(f"{text}\n", encoding="utf-8")
