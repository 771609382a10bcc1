"""Drift: what stayed is said to have stayed, what moved is measured, and the verdict follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from sentences import refused

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.source import open_source
from ldm_vae.export.diffusers_folder import configured_copy
from ldm_vae.export.drift_report import Drift, measure_drift
from ldm_vae.metrics.batches import image_batches


def drift(base: AutoencoderKL, tuned: AutoencoderKL, images: Path) -> Drift:
    source = open_source(str(images))
    batches = image_batches(source, range(6), 32, batch_size=4)
    return measure_drift(base, tuned, batches, resolution=32, lpips=False)


def changed(vae: AutoencoderKL, part: str, by: float) -> AutoencoderKL:
    copy = configured_copy(vae)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in list(copy.named_parameters()):
            if name.startswith(part):
                parameter.data = parameter + by * parameter.std() * torch.randn(parameter.shape, generator=draw)
    return copy


def test_a_decoder_tune_is_compatible(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    found = drift(tiny_vae, changed(tiny_vae, "decoder.conv_out", 0.01), image_folder)
    assert found.same_encoder and found.rms == 0 and found.images == 6
    assert found.cosine == pytest.approx(1) and found.scale == pytest.approx([1] * 4)
    assert found.psnr("base -> tuned") != found.psnr("base -> base")
    assert found.psnr("base -> tuned") == found.psnr("tuned -> tuned")
    assert found.verdict.startswith("compatible: the encoder is unchanged")


def test_a_shift_is_found_in_its_channel(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    moved = configured_copy(tiny_vae, scaling_factor=2.0)
    with torch.no_grad():
        moved.quant_conv.bias = torch.nn.Parameter(moved.quant_conv.bias + torch.tensor([0, 5.0, 0, 0, 0, 0, 0, 0]))
    found = drift(tiny_vae, moved, image_folder)
    assert not found.same_encoder and not found.same_normalisation
    assert abs(found.shift[1]) > 1 and max(abs(found.shift[i]) for i in (0, 2, 3)) < 1e-4
    assert found.scale == pytest.approx([1] * 4, abs=1e-3)
    assert found.verdict.startswith("not compatible") and "different normalisations" in found.verdict


def test_the_verdict_follows_the_distance(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    verdicts = [drift(tiny_vae, changed(tiny_vae, "quant_conv", by), image_folder) for by in (1e-4, 1.0)]
    assert verdicts[0].verdict.startswith("compatible: latents moved by 0.0")
    assert verdicts[1].verdict.startswith("not compatible") and verdicts[1].rms > verdicts[0].rms


def test_other_shapes_and_no_images_are_refused(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    other = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=5).build()
    with refused(UsageError, "TUNED"):
        drift(tiny_vae, other, image_folder)
    with refused(WorkError, "image"):
        measure_drift(tiny_vae, tiny_vae, [], resolution=32, lpips=False)


def test_as_a_user_calls_it(
    tiny_vae: AutoencoderKL,
    tiny_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed(tiny_vae, "decoder", 0.05).save_pretrained(tmp_path / "tuned")
    call = ("drift", tiny_vae_folder, tmp_path / "tuned", image_folder, "--images", 5, "--no_lpips")
    assert run_cli(*call) == 0
    printed = capsys.readouterr().out
    assert "encoder: identical; 5 images" in printed and "verdict: compatible" in printed
    assert run_cli(*call, "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["same_encoder"] is True and set(tree["metrics"]["base -> tuned"]["psnr"]) >= {"mean", "ci95", "n"}
