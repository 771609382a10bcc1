"""The programs a VAE is exported for, run on what we export: pipelines, their decode lines, a user's switches."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
    VQModel,
)
from PIL import Image
from sentences import refused
from tiny_pipeline import pipeline

from ldm_vae import LatentDataset
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation, NormalisationKind
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae


@pytest.fixture
def exported(tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "mine"
    assert run_cli("export", tiny_vae_folder, out, "--stats", image_folder, "--resolution", 32) == 0
    return out


# --- whole pipelines --------------------------------------------------------------------------------------------------


def test_text_to_image_and_image_to_image_with_our_vae(exported: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(exported)
    pipe = pipeline(vae, tmp_path / "words")
    call = {"num_inference_steps": 2, "output_type": "pt"}
    made = pipe("a red cat", height=32, width=32, generator=torch.Generator().manual_seed(0), **call).images
    assert made.shape == (1, 3, 32, 32) and made.isfinite().all()
    # the pipeline undoes our scaling before it decodes
    seen = pipe(
        "a red cat", height=32, width=32, generator=torch.Generator().manual_seed(0), **call | {"output_type": "latent"}
    ).images
    with torch.no_grad():
        expected = vae.decode(Normalisation.from_config(vae.config).undo(seen)).sample
    torch.testing.assert_close(made, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)

    edit = AutoPipelineForImage2Image.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    photo = Image.new("RGB", (32, 32), (200, 40, 40))
    edited = edit("a cat", image=photo, strength=0.6, generator=torch.Generator().manual_seed(0), **call).images
    assert edited.shape == (1, 3, 32, 32) and edited.isfinite().all()


def test_swapped_into_a_pipelines_folder(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    other = AutoencoderKL.from_config(dict(tiny_vae.config) | {"scaling_factor": 0.18215})
    folder = tmp_path / "pipeline"
    pipeline(other, tmp_path / "words").save_pretrained(folder)
    call = ("export", tiny_vae_folder, folder, "--pipeline", "--stats", image_folder, "--resolution", 32)
    assert run_cli(*call) == 0
    pipe = AutoPipelineForText2Image.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert torch.equal(pipe.vae.decoder.conv_out.weight, tiny_vae.decoder.conv_out.weight)
    assert pipe.vae.config.scaling_factor not in (1.0, 0.18215)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a dog", height=32, width=32, num_inference_steps=1, output_type="pt").images
    assert made.isfinite().all()


# --- the decode lines of the pipelines --------------------------------------------------------------------------------

SD = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
SDXL = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
SD3 = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
FLUX = "diffusers.pipelines.flux.pipeline_flux"

SCALED = "latents / self.vae.config.scaling_factor"
STANDARDISED = "latents * latents_std / self.vae.config.scaling_factor + latents_mean"
SHIFTED = "(latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor"


@pytest.mark.parametrize(
    ("module", "line", "kind"),
    [
        (SD, SCALED, "scale"),
        pytest.param(SDXL, SCALED, "scale", marks=pytest.mark.slow),
        pytest.param(SDXL, STANDARDISED, "channel", marks=pytest.mark.slow),
        (SD3, SHIFTED, "shift"),
        pytest.param(FLUX, SHIFTED, "shift", marks=pytest.mark.slow),
    ],
    ids=["sd-scale", "sdxl-scale", "sdxl-channel", "sd3-shift", "flux-shift"],
)
def test_stored_latents_decode_by_the_pipelines_own_line(
    module: str, line: str, kind: NormalisationKind, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    assert line in inspect.getsource(importlib.import_module(module))  # else diffusers has changed: look at it again
    vae_folder, store = tmp_path / "vae", tmp_path / "store"
    call = ("export", tiny_vae_folder, vae_folder, "--stats", image_folder, "--resolution", 32)
    assert run_cli(*call, "--normalisation", kind) == 0
    assert (
        run_cli("encode", vae_folder, image_folder, store, "--resolution", 32, "--dtype", "fp32", "--num_workers", 0)
        == 0
    )
    vae = load_autoencoder(vae_folder)
    scaled = torch.stack([LatentDataset(store, sample=False)[index]["latents"] for index in range(4)])
    raw = torch.stack([LatentDataset(store, raw=True)[index]["mean"] for index in range(4)])
    assert not torch.allclose(scaled, raw)

    class Pipeline:
        pass

    self = Pipeline()
    self.vae = vae  # type: ignore[attr-defined]
    names: dict[str, Any] = {"self": self, "latents": scaled}
    if kind == "channel":  # as SDXL's pipeline makes them, three lines above
        names["latents_mean"] = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
        names["latents_std"] = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
        assert "torch.tensor(self.vae.config.latents_mean).view(1, 4, 1, 1)" in inspect.getsource(
            importlib.import_module(module)
        )
    z = eval(line, names)  # diffusers' own, found in its source above
    torch.testing.assert_close(latents.decode(vae, z), latents.decode(vae, raw), rtol=1e-4, atol=1e-5)


def test_sdxl_takes_its_statistics_only_from_a_config_that_names_them(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    source = inspect.getsource(importlib.import_module(SDXL))
    assert 'hasattr(self.vae.config, "latents_mean") and self.vae.config.latents_mean is not None' in source
    out = write_vae(tiny_vae, tmp_path / "vae", Normalisation(0.5))
    assert AutoencoderKL.from_pretrained(out).config.latents_mean is None


# --- what a user switches on ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slicing_tiling_and_half_precision(exported: Path) -> None:
    vae = AutoencoderKL.from_pretrained(exported)
    z = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(z).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(z).sample, whole, rtol=1e-4, atol=1e-5)
    vae.disable_slicing()
    vae.enable_tiling()
    assert vae.tile_sample_min_size == 32  # the resolution it was exported with, so 32 px are one tile
    torch.testing.assert_close(vae.decode(z).sample, whole, rtol=1e-4, atol=1e-5)
    assert vae.decode(torch.cat([z, z], dim=3)).sample.shape == (3, 3, 32, 64)
    half = AutoencoderKL.from_pretrained(exported, torch_dtype=torch.float16)
    assert vae.config.force_upcast is False
    error = float((half.decode(z.half()).sample.float() - whole).square().mean())
    assert 10 * math.log10(4 / error) > 50


@pytest.mark.slow
@torch.no_grad()
def test_compiled(exported: Path) -> None:
    vae = AutoencoderKL.from_pretrained(exported)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z).sample
    vae.decoder.compile(backend="aot_eager")  # in place: the names of the weights stay
    torch.testing.assert_close(vae.decode(z).sample, expected, rtol=1e-4, atol=1e-5)
    assert not any("_orig_mod" in name for name in vae.state_dict())
    write_vae(vae, exported, None)  # and it can still be exported


# --- the other autoencoders -------------------------------------------------------------------------------------------


def tiny_autoencoder() -> AutoencoderTiny:
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)


def vq_model() -> VQModel:
    return VQModel(block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=32, latent_channels=4,
                   down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip


@pytest.mark.parametrize("build", [tiny_autoencoder, vq_model])
def test_other_autoencoders_are_exported_too(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    out = write_vae(model, tmp_path / "model", Normalisation(0.5))
    loaded = type(model).from_pretrained(out)
    assert loaded.config.scaling_factor == 0.5
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert f"import {type(model).__name__}" in (out / "README.md").read_text()
    channel = Normalisation(1.0, None, (0.0,) * 4, (1.0,) * 4)
    with refused(UsageError, "normalisation"):
        write_vae(model, tmp_path / "other", channel)


def test_a_tiny_decoder_takes_our_latents(exported: Path) -> None:
    """Shapes agree, so that a distilled AutoencoderTiny can stand in for the decoder."""
    vae, tiny = AutoencoderKL.from_pretrained(exported), tiny_autoencoder().eval()
    with torch.no_grad():
        z = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
        assert tiny.decode(z).sample.shape == vae.decode(z).sample.shape
