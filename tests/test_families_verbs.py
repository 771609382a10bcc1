"""Every verb takes every autoencoder class of images, or refuses it in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cli_call import program, run_cli
from images import write_images
from sentences import refused
from tiny_classes import IMAGES, tiny

from eval import diffusability, families, latent_space
from ldm_vae import LatentDataset, evaluate, load_autoencoder, open_images, write_store
from ldm_vae.autoencoder.geometry import geometry_of, step_of
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.diffusion.config import DiffusionTraining, open_latents
from ldm_vae.export.card import Card
from ldm_vae.metrics.linear import why_no_code
from ldm_vae.metrics.result import describe_vae
from ldm_vae.report import tables
from ldm_vae.report.contents import Contents
from ldm_vae.run.store_training import load_decoder
from train import diffusion

DATA = {"images": 2, "resolution": 64}
PROBE = "--layers 1 --heads 2 --head_dim 8 --train_images 8 --batch_size 4 --seeds 1 --samples 4 --steps 1"

DIFFUSION = {
    "output_dir": "unused", "latents": "unused", "train_batch_size": 2, "learning_rate": 1e-3, "max_train_images": 4,
    "ema_halflife_images": 4, "log_every_images": 4, "checkpoint_every_images": 4, "sample_every_images": 4,
    "sample_images": 2, "measure_images": 2, "dataloader_num_workers": 0, "sampling": {"steps": 1},
    "denoiser": {"kind": "dit", "patch_size": 1, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("few_features")
@pytest.mark.parametrize("name", IMAGES)
def test_every_verb_takes_it(name: str, tmp_path: Path) -> None:
    network = tiny(name)
    vae, images, store = tmp_path / "vae", tmp_path / "images", tmp_path / "store"
    network.save_pretrained(vae)
    write_images(images, 6, (40, 36))
    geometry = geometry_of(network)
    side, channels = ("--resolution", geometry.side or 32), ("--channels", geometry.in_channels)
    words = [
        ("encode", vae, images, store, *side, *channels),
        ("store", "verify", store, "--reencode", 2, "--data", images, "--vae", vae),
        ("store", "stats", store),
        ("decode", store, tmp_path / "decoded", "--count", 2, "--vae", vae),
        ("reconstruct", vae, min(images.iterdir()), tmp_path / "seen", *side, *channels),
        ("evaluate", vae, images, "--output", tmp_path / "measured", "--metrics", "psnr", *side, *channels),
        ("drift", vae, vae, images, "--no_lpips", *side, *channels),
        ("export", vae, tmp_path / "out", "--stats", images, *side, *channels),
    ]
    words.append(("report", tmp_path / "measured"))
    for line in words:
        assert run_cli(*line) == 0, line[0]
    assert name in (tmp_path / "measured" / "index.html").read_text(encoding="utf-8")
    assert name in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 2
    few = ("--likelihood_images", 1, "--repeats", 2, "--pairs", 1)
    program(latent_space, vae, images, "--output", tmp_path / "space", *few, *side, *channels)
    program(diffusability, vae, images, "--output", tmp_path / "probe", *PROBE.split(), *side, *channels)
    law = () if own_normalisation(network) else ("--normalisation", "scale")
    (tmp_path / "diffusion.yaml").write_text(yaml.safe_dump(DIFFUSION))
    denoise = (tmp_path / "diffusion.yaml", "--latents", store, "--output_dir", tmp_path / "denoised", *law)
    if name == "VQModel":  # codes
        with refused(UsageError, "indices"):
            program(diffusion, *denoise)
    else:
        program(diffusion, *denoise)
        assert (tmp_path / "denoised" / "denoiser" / "config.json").is_file()
    assert run_cli("fp16", "audit", vae, images, "--images", 1, *side, *channels) == 0
    wide = min(write_images(tmp_path / "wide", 1, (96, 64)).iterdir())
    tiled = run_cli("tiling", vae, wide, "--tile", 32, "--overlap", 0.5, *channels)
    # no tiling, or one for f = 8 alone
    without = ("AsymmetricAutoencoderKL", "AutoencoderRAE", "AutoencoderTiny", "VQModel")
    assert tiled == (2 if name in without else 0)


@pytest.mark.parametrize("name", IMAGES)
def test_a_store_has_buckets_views_and_tiles(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    geometry = geometry_of(vae)
    source = open_images(str(write_images(tmp_path / "images", 3, (64, 40))), vae)
    step = max(8, step_of(vae))
    side = geometry.side or 4 * step
    tile = None if geometry.side else (max(16, step), 0)
    if geometry.side:  # it would make squares of them
        with refused(UsageError, "buckets"):
            write_store(vae, source, tmp_path / "none", resolution=side, bucket_step=step)
    else:
        with refused(UsageError, "buckets"):
            write_store(vae, source, tmp_path / "none", resolution=side, bucket_step=step_of(vae) // 2)
    buckets = None if geometry.side else step
    out = tmp_path / "store"
    write_store(vae, source, out, resolution=side, bucket_step=buckets, views="ten_crop", tile=tile, batch_size=2)
    kind = None if own_normalisation(vae) or name == "VQModel" else "scale"
    given = "indices" if name == "VQModel" else "latents"
    for view in ("", "flip", "bottom_right"):
        data = LatentDataset(out, view=view, normalisation=kind)
        for index in range(3):
            item = data[index][given]
            assert item.shape == data.shape(index) and data.decode(item, vae).shape[0] == geometry.in_channels
    (height, width) = data.shards[0].size
    assert height % step == width % step == 0 and (height > width) == (buckets is not None)
    if tile and not geometry.is_point:
        whole = tmp_path / "whole"
        write_store(vae, source, whole, resolution=side, bucket_step=buckets, batch_size=2)
        one, two = (LatentDataset(path, raw=True)[0]["mean"] for path in (out, whole))
        assert one.shape == two.shape and not one.equal(two)


@pytest.mark.parametrize("name", IMAGES)
def test_sizes_that_would_be_cut_or_padded_are_refused(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    source = open_images(str(write_images(tmp_path / "images", 1)), vae)
    with refused(UsageError, "resolution"):
        write_store(vae, source, tmp_path / "store", resolution=32 + step_of(vae) // 2)
    with refused(UsageError, "resolution"):
        evaluate(vae, source, resolution=32 + step_of(vae) // 2, metrics=["psnr"])


@pytest.mark.parametrize("name", IMAGES)
def test_the_card_and_the_page_know_it(name: str) -> None:
    vae = tiny(name)
    geometry, card = geometry_of(vae), Card("mine").text(vae)
    measured = describe_vae(vae, "mine", "here")
    assert f"f = {geometry.factor} " in card and f"{geometry.latent_channels} latent channels" in card
    using = sorted(family for family, used in families.pipelines().items() if name in used)
    assert f"`{name}`" in card and (", ".join(using[:6]) or "No pipeline") in card
    assert (f" and {len(using) - 6} more of diffusers" in card) == (len(using) > 6)
    law = measured["normalisation"]
    assert ("bn" in law) == ("`bn`" in card) == (name == "AutoencoderKLFlux2")
    assert law.startswith("none") == ("names no normalisation" in card)
    page = tables.subtitle(Contents("mine", Path(), Path(), results=[{"vae": measured, "data": DATA}]))
    assert name in page and law in page
    (figure,) = tables.headline(
        Contents("mine", Path(), Path(), results=[{"vae": measured, "data": DATA, "metrics": {}}])
    )
    ratio = geometry.in_channels * geometry.factor**2 / geometry.latent_channels
    assert figure["value"] == f"{max(ratio, 1 / ratio):.3g}"
    assert figure["label"] == ("Fewer numbers" if ratio >= 1 else "More numbers")


def test_why_there_is_no_linear_code() -> None:
    assert why_no_code(tiny("VQModel")) == "linear code: none beside a VQModel, whose codebook is no continuous code"
    more = tiny("AutoencoderKL", latent_channels=16)
    assert "which gives 16 numbers for the 12 of a patch" in str(why_no_code(more))
    assert "24 + 16 k frames" in str(why_no_code(tiny("AutoencoderKLAllegro"), clips=True))
    assert why_no_code(tiny("AutoencoderKLWan"), clips=True) is None
    assert all(why_no_code(tiny(name)) is None for name in IMAGES if name != "VQModel")


def test_a_store_that_names_no_vae_needs_one_for_samples(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKL")
    vae.save_pretrained(tmp_path / "vae")
    source = open_images(str(write_images(tmp_path / "images", 2)), vae)
    write_store(load_autoencoder(tmp_path / "vae"), source, tmp_path / "store", resolution=32)
    settings = config.validate(DiffusionTraining, DIFFUSION | {"latents": str(tmp_path / "store")}, "test")
    with refused(UsageError, "does not name the VAE that made it"):
        load_decoder(settings, open_latents(settings))
    named = settings.model_copy(update={"vae": str(tmp_path / "vae")})
    assert load_decoder(named, open_latents(named)) is not None
