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

from ldm_vae.autoencoder import latents
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
