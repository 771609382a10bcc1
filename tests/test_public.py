"""The public surface, `ldm_vae.__all__`: typed, documented, and every example of it true."""

from __future__ import annotations

import doctest
import inspect
import pydoc
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from images import write_images

import ldm_vae

NAMES = sorted(ldm_vae.__all__)


@pytest.fixture
def home(tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `photos` and `my-vae`, to be in."""
    tiny_vae.save_pretrained(tmp_path / "my-vae")
    write_images(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(name: str) -> list[doctest.DocTest]:
    found = ldm_vae if name == "ldm_vae" else getattr(ldm_vae, name)
    text = inspect.getdoc(found) or ""
    return [doctest.DocTestParser().get_doctest(text, {}, name, None, None)]


@pytest.mark.parametrize("name", ["ldm_vae", *NAMES])
def test_the_examples_are_true(name: str, home: Path) -> None:
    (test,) = examples(name)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_typed(name: str) -> None:
    found = getattr(ldm_vae, name)
    assert found.__module__.startswith("ldm_vae.")
    members = (
        [found] if inspect.isfunction(found) else [one for _, one in inspect.getmembers(found, inspect.isfunction)]
    )
    own = [one for one in members if one.__module__.startswith("ldm_vae.") and not one.__name__.startswith("_")]
    for function in own:
        signature = inspect.signature(function)
        assert signature.return_annotation is not signature.empty, function
        parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
        assert all(one.annotation is not one.empty for one in parameters), function


def test_help_shows_all_of_it_and_nothing_is_public_by_accident() -> None:
    text = pydoc.plain(pydoc.render_doc(ldm_vae))
    assert all(name in text for name in NAMES)
    assert set(NAMES) <= set(dir(ldm_vae))
    with pytest.raises(AttributeError):
        _ = ldm_vae.load_autoencodr  # type: ignore[attr-defined]
