"""The card says what is true: head, tables, recipe, pictures, preview factors; and what is private stays so."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_call import run_cli
from diffusers import AutoencoderKL
from PIL import Image
from sentences import refused

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core.errors import WorkError
from ldm_vae.export.card import Card, card_name
from ldm_vae.export.drift_report import measure_drift
from ldm_vae.export.measurement import Images
from ldm_vae.export.picture import reconstruction_sheet
from ldm_vae.export.preview import FILE, fit_preview, pairs_of_images, pairs_of_store
from ldm_vae.export.recipe import base_license, read_recipe
from ldm_vae.export.store_card import store_card
from ldm_vae.latent_store import read_manifest


def head_of(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---")[1]))


@pytest.fixture
def run_folder(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """A finished run as far as an export looks at it."""
    run = tmp_path / "run"
    tiny_vae.register_to_config(scaling_factor=0.7)
    tiny_vae.save_pretrained(run / "vae")
    config = {
        "output_dir": "/home/me/run",
        "resolution": 32,
        "init_from": "some-lab/base-vae",
        "losses": {"l1": {"weight": 1.0}, "kl": {"weight": 1e-6}},
        "adversary": {"weight": 0.5, "start_images": 5000},
        "data": {"kind": "hub", "path": "some-lab/photographs"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"images": 100, "num_processes": 2}\n{"images": 12000, "seconds": 5400.0}\n')
    (run / "report").mkdir()
    metrics = {"psnr": {"mean": 27.25, "ci95": [27.0, 27.5], "n": 40}}
    data = {"source": "held-out", "images": 40, "checksum": "ab" * 32, "resolution": 32}
    protocol = {"name": "ldm-vae", "version": 1, "posterior": "mode", "rounding": "round"}
    result = {"vae": {"name": "mine"}, "data": data, "protocol": protocol, "metrics": metrics}
    (run / "report" / "metrics.json").write_text(json.dumps(result))
    return run


def test_a_run_gives_its_recipe_and_results(run_folder: Path, tmp_path: Path) -> None:
    assert run_cli("export", run_folder, tmp_path / "mine", "--license", "apache-2.0") == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    head = head_of(card)
    assert head["library_name"] == "diffusers" and head["license"] == "apache-2.0" and "vae" in str(head["tags"])
    assert head["base_model"] == "some-lab/base-vae" and head["datasets"] == ["some-lab/photographs"]
    for words in (
        "27.25",
        "12,000 images seen by 2 process(es)",
        "1.5 hours, 3 process-hours",
        "l1 1.0",
        "from 5,000 images on",
        "Half precision",
    ):
        assert words in card, words
    assert 'AutoencoderKL.from_pretrained("mine")' in card and "scaling_factor: 0.7" in card
    assert "/home/me" not in card


@pytest.mark.parametrize("head", [b"license: [", b"license: " + b"[" * 10**5, b"- a", b"\xff", b"license: 7"])
def test_a_base_whose_card_cannot_be_read_lends_none(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "README.md").write_bytes(b"---\n" + head + b"\n---\n")
    assert base_license(str(tmp_path)) is None


def test_local_paths_stay_at_home_and_a_local_base_lends_its_licence(run_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: openrail\n---\n# base\n")
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config |= {"init_from": str(base), "data": {"kind": "folder", "path": str(tmp_path)}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = read_recipe(run_folder)
    assert recipe.metadata == {"license": "openrail"}
    assert str(tmp_path) not in recipe.sections["Training"]


def test_drift_stands_in_the_card(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = functools.partial(measure_drift, lpips=False)  # the weights of LPIPS are not this test's business
    monkeypatch.setattr("ldm_vae.export.workflow.measure_drift", metrics)
    call = ("export", tiny_vae_folder, tmp_path / "out", "--resolution", 32, "--drift_from", tiny_vae_folder)
    assert run_cli(*call) == 2
    stats = ("--stats", image_folder)
    assert run_cli(*call, *stats, "--normalisation_from", tiny_vae_folder) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Drift" in card and "encoder: identical; 12 images" in card and "verdict: compatible" in card
    # what is written counts, not what SRC's config says: a measured scaling is another one than the base's
    assert run_cli(*call, *stats) == 0
    assert "verdict: not compatible as it is" in (tmp_path / "out" / "README.md").read_text()


def test_names() -> None:
    assert card_name(Path("runs/demo/vae")) == "demo" and card_name(Path("a/mine")) == "mine"
    assert card_name(Path("a/mine.safetensors")) == "mine"


def test_each_normalisation_shows_its_formula(tiny_vae: AutoencoderKL) -> None:
    tiny_vae.register_to_config(**Normalisation(0.5, 0.25).to_config())
    card = Card("mine").text(tiny_vae)
    assert "(z - shift_factor) * scaling_factor" in card and "shift_factor: 0.25" in card
    assert "latents_std" not in card


# --- pictures and previews --------------------------------------------------------------------------------------------


def test_pictures_hold_originals_above_reconstructions(tiny_vae: AutoencoderKL) -> None:
    pixels = torch.full((3, 3, 16, 16), -1.0)
    pixels[1] = 1.0
    sheet = Image.open(io.BytesIO(reconstruction_sheet(tiny_vae, pixels)))
    assert sheet.size == (48, 32) and sheet.getpixel((0, 0)) == (0, 0, 0) and sheet.getpixel((20, 3)) == (255, 255, 255)
    grey = torch.zeros(2, 1, 8, 8)
    tiny = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4).eval()
    assert Image.open(io.BytesIO(reconstruction_sheet(tiny, grey))).mode == "L"


def test_preview_factors_are_the_least_squares_map() -> None:
    draw = torch.Generator().manual_seed(0)
    factors, bias = torch.randn(4, 3, generator=draw), torch.tensor([0.1, -0.2, 0.3])
    scaled = torch.randn(6, 4, 5, 5, generator=draw)
    colours = torch.einsum("bchw,cd->bdhw", scaled, factors) + bias.view(-1, 1, 1)
    found = fit_preview(zip(scaled.split(4), colours.split(4), strict=True))
    torch.testing.assert_close(torch.tensor(found.factors), factors, rtol=1e-5, atol=1e-5)
    assert found.bias == pytest.approx(bias.tolist(), abs=1e-5) and found.r2 == pytest.approx(1) and found.images == 6
    torch.testing.assert_close(found.colours(scaled), colours, rtol=1e-4, atol=1e-5)
    noisy = fit_preview([(scaled, colours + 10 * torch.randn(colours.shape, generator=draw))])
    assert noisy.r2 < 0.5
    with refused(WorkError, "image"):
        fit_preview([])


@pytest.mark.slow
def test_preview_from_images_and_from_a_store(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    assert run_cli("encode", tiny_vae_folder, image_folder, store, "--resolution", 32, "--num_workers", 0) == 0
    vae = load_autoencoder(tiny_vae_folder)
    normalisation = Normalisation(2.0)
    images = Images(str(image_folder), 32).batches(vae)
    assert 0 < fit_preview(pairs_of_images(vae, images, normalisation)).r2 < 1
    assert fit_preview(pairs_of_store(vae, store, normalisation, limit=5)).images == 5
    call = ("export", tiny_vae_folder, out, "--preview", "--resolution", 32)
    assert run_cli(*call) == 2
    assert "--stats" in capsys.readouterr().err
    for stats in (image_folder, store):
        assert run_cli(*call, "--stats", stats) == 0
        assert "latent_rgb_factors = [" in capsys.readouterr().out
        tree = json.loads((out / FILE).read_text())
        assert len(tree["latent_rgb_factors"]) == 4 and len(tree["latent_rgb_factors_bias"]) == 3
    assert run_cli(*call, "--stats", image_folder) == 0
    assert (out / "pictures" / "reconstruction.png").is_file()
    assert "![originals and their reconstructions](pictures/reconstruction.png)" in (out / "README.md").read_text()


# --- stores -----------------------------------------------------------------------------------------------------------


def test_a_store_has_a_card(tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "junk.png").write_bytes(b"junk")
    store = tmp_path / "store"
    assert run_cli("encode", tiny_vae_folder, image_folder, store, "--resolution", 32, "--num_workers", 0) == 0
    manifest = read_manifest(store)
    card = store_card("my-latents", manifest, license="cc0-1.0")
    head = head_of(card)
    assert head["license"] == "cc0-1.0" and head["size_categories"] == ["n<1K"] and "latents" in head["tags"]
    assert "source_datasets" not in head and str(tmp_path) not in card
    for words in (
        "12 images as latents",
        'LatentDataset("my-latents")',
        "4x16x16",
        "`mean` and `logvar`",
        "1 images could not be used",
        manifest.identity.encoder,
        "scaling_factor 1.0",
        "| scaling_factor |",
    ):
        assert words in card, words
    public = manifest.model_copy(
        update={"recorded": manifest.recorded.model_copy(update={"vae": "lab/vae", "data": "lab/photographs"})}
    )
    shown = store_card("my-latents", public)
    assert head_of(shown)["source_datasets"] == ["lab/photographs"] and "VAE (`lab/vae`)" in shown
