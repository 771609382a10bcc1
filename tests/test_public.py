"""The public surface, `ldm_vae.__all__`: typed, documented, and every example of it true."""

from __future__ import annotations

import doctest
import inspect
import math
import pydoc
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from images import write_images
from repository import ROOT
from sentences import refused

import ldm_vae
from ldm_vae.core.errors import UsageError
from ldm_vae.data.transforms import to_pixels
from ldm_vae.metrics.batches import image_batches

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


def test_the_page_is_true(home: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(f"ldm_vae.{name}" in page for name in NAMES if name not in ("AutoencoderConfig", "Moments"))
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(page, {}, "api.md", None, None)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert len(test.examples) > 10 and not said, "".join(said)


@pytest.mark.parametrize(
    ("original", "reconstruction", "metrics", "says"),
    [
        (torch.zeros(3, 64, 64), torch.zeros(3, 64, 64), ["psnr"], "of one shape"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32), ["psnr"], "of one shape"),
        (torch.full((1, 3, 64, 64), 255.0), torch.zeros(1, 3, 64, 64), ["psnr"], "got values from 255 to 255"),
        (torch.full((1, 3, 64, 64), math.nan), torch.zeros(1, 3, 64, 64), ["psnr"], "got values from nan"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), ["fd_efflite0"], "of whole sets"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), ["pnsr"], "metrics: expected one of"),
    ],
)
def test_measure_refuses(original: torch.Tensor, reconstruction: torch.Tensor, metrics: list[str], says: str) -> None:
    with refused(UsageError, says):
        ldm_vae.measure(original, reconstruction, metrics=metrics)


def test_measure_is_what_evaluate_measures(home: Path) -> None:
    vae = ldm_vae.load_autoencoder("my-vae")
    photos = ldm_vae.open_images("photos", vae)
    whole = ldm_vae.evaluate(vae, photos, resolution=64, metrics=["psnr", "ssim"])
    (batch,) = image_batches(photos, None, 64, batch_size=12)
    pixels = to_pixels(batch.pixels)
    with torch.no_grad():
        decoded = ldm_vae.decode(vae, ldm_vae.encode(vae, pixels).mean)
    for name, values in ldm_vae.measure(pixels, decoded, metrics=["psnr", "ssim"]).items():
        assert values.mean().item() == pytest.approx(whole.metrics[name].mean, rel=1e-6)


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
    assert [name for name in sorted(dir(ldm_vae)) if not name.startswith("_")] == NAMES
    with pytest.raises(AttributeError):
        _ = ldm_vae.load_autoencodr  # type: ignore[attr-defined]


def test_what_is_public_is_one_line_in_an_interpreter(home: Path) -> None:
    vae = ldm_vae.load_autoencoder("my-vae")
    photos = ldm_vae.open_images("photos", vae)
    law = ldm_vae.Normalisation(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16, patch=2)
    said = {
        law: "Normalisation(channel: mean and std of 16 channels, 2x2 patches)",
        ldm_vae.Normalisation(0.5, 0.1): "Normalisation(shift: scaling_factor 0.5, shift_factor 0.1)",
    }
    assert {one: repr(one) for one in said} == said
    point = ldm_vae.Moments.point(torch.zeros(1, 4, 8, 8))
    assert repr(point) == "Moments(mean alone [1, 4, 8, 8], torch.float32, cpu)"
    manifest = ldm_vae.write_store(vae, photos, "two", resolution=[32, 64])
    expected = "Manifest(24 samples in 2 shards: moments 4x16x16 and 1 more in fp16)"
    assert repr(manifest) == str(manifest) == expected
    assert repr(ldm_vae.LatentDataset("two", resolution=64)).startswith("LatentDataset('two': 12 samples, moments ")
    result = ldm_vae.evaluate(vae, photos, resolution=64, metrics=["psnr"])
    assert len(repr(result)) < 120 and "\n" not in repr(result)
    assert repr(photos) == "FolderSource('photos': 12 images)"
