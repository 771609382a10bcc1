"""Tiling: the error is measured against the whole image, found at its place, and refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from images import write_images
from sentences import refused
from tiny_classes import IMAGES, tiny

from ldm_vae import open_images, write_store
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.errors import UsageError
from ldm_vae.export.seam_error import _seams, measure_tiling


def test_as_diffusers_does_it(tiny_vae: AutoencoderKL) -> None:
    pixels = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measure_tiling(tiny_vae, pixels, tile=32)
    assert not tiny_vae.use_tiling and tiny_vae.tile_overlap_factor == 0.25  # the model is as it was
    with torch.no_grad():
        z = latents.encode(tiny_vae, pixels).mean
        whole = latents.decode(tiny_vae, z)
        tiny_vae.enable_tiling()
        tiny_vae.tile_sample_min_size, tiny_vae.tile_latent_min_size = 32, 16
        tiled = latents.decode(tiny_vae, z)
    difference = (whole.clamp(-1, 1) - tiled.clamp(-1, 1)).abs() * 127.5
    assert found.largest == pytest.approx(float(difference.max()), rel=1e-5)
    assert found.tiles == 2 * 4 and found.latent_rms > 0 and 0 < found.psnr < 100
    seams = _seams(48, 80, 32, 0.25)
    expected = float(seams.double().mean()) * found.at_seams + float((~seams).double().mean()) * found.inside
    assert expected == pytest.approx(float(difference.mean()), rel=1e-4)


WITHOUT = ("AsymmetricAutoencoderKL", "AutoencoderRAE", "VQModel")
F8 = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
      "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in WITHOUT])
def test_every_class_as_diffusers_tiles_it(name: str) -> None:
    vae = tiny(name, **(F8 if name == "AutoencoderTiny" else {}))
    geometry = geometry_of(vae)
    factor, side = geometry.factor, geometry.factor * 8
    shape = (1, geometry.in_channels, factor * 12, factor * 10)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = {key: value for key, value in vars(vae).items() if "til" in key}
    found = measure_tiling(vae, pixels, tile=side)
    assert {key: value for key, value in vars(vae).items() if "til" in key} == before and not vae.use_tiling
    assert (found.latent_rms is None) == (name == "AutoencoderKLHunyuanImage")
    assert found.tiles == 2 * 2 and (found.latent_rms is None or found.latent_rms > 0)
    with torch.no_grad():
        z = latents.encode(vae, pixels).mean
        whole = latents.decode(vae, z)
        if hasattr(vae, "tile_sample_min_height"):
            vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
        else:
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = side, 8, 0.25
        tiled = latents.decode(vae, z)
    largest = float((whole.clamp(-1, 1) - tiled.clamp(-1, 1)).abs().max() * 127.5)
    assert found.largest == pytest.approx(largest, rel=1e-5) and (largest > 0) == (name != "ConsistencyDecoderVAE")
    # what is on stays on, and is not what the whole image is measured with
    assert measure_tiling(vae, pixels, tile=side) == found and vae.use_tiling


@pytest.mark.parametrize("name", [*WITHOUT, "AutoencoderTiny"])
def test_a_class_without_tiling_says_so(name: str) -> None:
    vae = tiny(name)
    geometry = geometry_of(vae)
    with refused(UsageError, "tiling"):
        measure_tiling(vae, torch.zeros(1, 3, 96, 96), tile=8 * geometry.factor)
    assert not getattr(vae, "use_tiling", False)


def test_an_encoder_that_fails_in_tiles_is_left_out() -> None:
    vae = tiny("AutoencoderTiny", latent_channels=16, **F8)
    found = measure_tiling(vae, torch.zeros(1, 3, 96, 96), tile=64)
    assert found.latent_rms is None and "not encoded in tiles" in found.line() and found.tiles == 4


def test_a_store_knows_of_no_tiling_but_its_own(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    images = str(write_images(tmp_path / "images", 1))
    tiny_vae.enable_tiling()
    with refused(UsageError, "vae"):
        write_store(tiny_vae, open_images(images, tiny_vae), tmp_path / "store", resolution=32)
    rae = tiny("AutoencoderRAE")
    with refused(UsageError, "tile"):
        write_store(rae, open_images(images, rae), tmp_path / "store", resolution=32, tile=(16, 8))
    assert not (tmp_path / "store").exists()


def test_seams_are_where_tiles_are_blended() -> None:
    seams = _seams(64, 64, 32, 0.25)  # steps of 24: blended at 24..31 and 48..55
    line = seams[0]
    assert line.nonzero().flatten().tolist() == [*range(24, 32), *range(48, 56)]
    assert bool((seams == seams.T).all())


def test_nothing_to_tile_is_refused(tiny_vae: AutoencoderKL) -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    with refused(UsageError, "IMAGE"):
        measure_tiling(tiny_vae, pixels, tile=32)
    with refused(UsageError, "tile"):
        measure_tiling(tiny_vae, pixels, tile=31)
    with refused(UsageError, "overlap"):
        measure_tiling(tiny_vae, pixels, tile=16, overlap=0.3)


def test_as_a_user_calls_it(tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_images(tmp_path / "wide", 1, (51, 90)) / "img_0000.png"
    assert run_cli("tiling", tiny_vae_folder, image) == 0
    printed = capsys.readouterr().out
    assert "90 x 50 px in tiles of 32 px" in printed and "overlap  25%" in printed and "overlap  50%" in printed
    assert run_cli("tiling", tiny_vae_folder, image, "--overlap", 0.5, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["overlap"] == 0.5
    assert run_cli("tiling", tiny_vae_folder, tmp_path / "none.png") == 2
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert run_cli("tiling", tiny_vae_folder, tmp_path / "bad.png") == 2
    assert "IMAGE" in capsys.readouterr().err
