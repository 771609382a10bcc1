"""A store gives what pipelines of diffusers give their diffusion model, and shows what they show of it: their own
lines, run with a tiny VAE, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.modular_pipelines.flux3 import decoders as flux3_decoders
from diffusers.modular_pipelines.flux3 import encoders as flux3_encoders
from diffusers.modular_pipelines.ideogram4.decoders import Ideogram4DecodeStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from images import write_images
from pipeline_lines import shown, with_vae
from sentences import refused
from tiny_classes import IMAGES, tiny

from eval import families
from ldm_vae import LatentDataset, Normalisation, open_images, write_store
from ldm_vae.autoencoder.families import VARIANTS
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.autoencoder.signals import enter
from ldm_vae.core.errors import UsageError
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_store.maintain.summary import describe

CPU = torch.device("cpu")
Encode = Callable[[Any, torch.Tensor], torch.Tensor]


def vae_image(pipeline: type, **parts: Any) -> Encode:
    """`_encode_vae_image` of a pipeline."""
    return lambda vae, pixels: with_vae(pipeline, vae, **parts)._encode_vae_image(enter(vae, pixels), None)


def noised(pipeline: type, **more: Any) -> Encode:
    """`prepare_latents` of a pipeline from image to image, without the noise."""
    wanted = {"timestep": None, "batch_size": 1, "num_images_per_prompt": 1, "dtype": torch.float32, "device": CPU}
    return lambda vae, pixels: with_vae(pipeline, vae).prepare_latents(pixels, **wanted | more)


def wan(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    parts = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": geometry_of(vae).factor}
    made = with_vae(diffusers.WanVideoToVideoPipeline, vae, **parts)
    side: Any = {"height": pixels.shape[-1], "width": pixels.shape[-1]}
    return made.prepare_latents(pixels[:, :, None], 1, vae.config.z_dim, **side, dtype=torch.float32, device=CPU)


def bria(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return with_vae(diffusers.BriaFibo2Pipeline, vae).prepare_image_latents([pixels], 1, CPU, torch.float32)[0]


def sprint(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """SANA-Sprint's scheduler has a scale of its own; at 1 and without noise, what is left is the VAE's."""
    scheduler = SimpleNamespace(config=SimpleNamespace(sigma_data=1.0))
    made = with_vae(diffusers.SanaSprintImg2ImgPipeline, vae, scheduler=scheduler, vae_scale_factor=2)
    side = pixels.shape[-1]
    return made.prepare_latents(pixels, torch.zeros(()), 1, 4, side, side, torch.float32, CPU, None)


def flux3(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    state = PipelineState({"condition_images": [pixels]})
    flux3_encoders.Flux3VaeEncoderStep()(SimpleNamespace(vae=vae, _execution_device=CPU), state)
    return state.values["image_cond_latents"][0]


@dataclass(frozen=True)
class Case:
    """A class, with changes of its config; the lines that encode, where pipelines have any; the pipeline that decodes,
    and its variables, of the latents."""

    name: str
    encode: Encode | None
    decode: type
    changes: dict[str, Any] = field(default_factory=dict)
    variables: Callable[[Any, torch.Tensor], dict[str, Any]] = lambda vae, latents: {}
    pipelines: str | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.decode.__name__}"


def as_clip(vae: Any, latents: torch.Tensor) -> dict[str, Any]:
    return {"latents": latents[:, :, None]}


def packed(pipeline: Any) -> Callable[[Any, torch.Tensor], dict[str, Any]]:
    """Latents as tokens, which the pipeline makes images of again."""

    def variables(vae: Any, latents: torch.Tensor) -> dict[str, Any]:
        factor = geometry_of(vae).factor
        height, width = latents.shape[2:]
        return {
            "latents": pipeline._pack_latents(latents, len(latents), latents.shape[1], height, width),
            "height": height * factor, "width": width * factor, "parts": {"vae_scale_factor": factor},
        }  # fmt: skip

    return variables


def ideogram_tokens(vae: Any, latents: torch.Tensor) -> dict[str, Any]:
    return {
        "latents": latents.flatten(2).transpose(1, 2), "grid_h": latents.shape[2], "grid_w": latents.shape[3],
        "batch_size": len(latents), "num_images_per_prompt": 1, "parts": {"patch_size": 2},
    }  # fmt: skip


def drawing(vae: Any, latents: torch.Tensor) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0)}


SDXL = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [3.0, 0.7, 1.1, 2.0], "scaling_factor": 0.13025}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
MOVQ = {"norm_type": "spatial", "block_out_channels": [32, 32]}
CASES = [
    Case("AutoencoderKL", noised(diffusers.StableDiffusionImg2ImgPipeline), diffusers.StableDiffusionPipeline),
    Case("AutoencoderKL", noised(diffusers.StableDiffusion3Img2ImgPipeline), diffusers.StableDiffusion3Pipeline, FLUX),
    Case("AutoencoderKL", vae_image(diffusers.FluxImg2ImgPipeline), diffusers.FluxPipeline, FLUX,
         packed(diffusers.FluxPipeline)),
    Case("AutoencoderKL", None, diffusers.ZImagePipeline, FLUX),
    Case("AutoencoderKL", noised(diffusers.StableDiffusionXLImg2ImgPipeline), diffusers.StableDiffusionXLPipeline, SDXL,
         lambda vae, latents: {"needs_upcasting": False}),
    Case("AsymmetricAutoencoderKL", vae_image(diffusers.StableDiffusionInpaintPipeline),
         diffusers.StableDiffusionPipeline),
    Case("AutoencoderTiny", noised(diffusers.StableDiffusionImg2ImgPipeline), diffusers.DreamLitePipeline,
         {"scaling_factor": 0.5}),
    Case("AutoencoderDC", sprint, diffusers.SanaPipeline),
    Case("AutoencoderDC", None, diffusers.PRXPipeline, {}, lambda vae, latents: {"use_resolution_binning": False}),
    Case("AutoencoderKLHunyuanImage", None, diffusers.HunyuanImagePipeline),
    Case("AutoencoderKLFlux2", vae_image(diffusers.Flux2Pipeline), diffusers.Flux2Pipeline, {},
         lambda vae, latents: {"latent_ids": None, "parts": {"_unpack_latents_with_ids": lambda same, ids: same}}),
    Case("AutoencoderKLFlux2", bria, diffusers.BriaFibo2Pipeline, pipelines="bria_fibo2"),
    Case("AutoencoderKLFlux2", None, diffusers.ErnieImagePipeline, pipelines="ernie_image"),
    Case("AutoencoderKLFlux2", None, diffusers.Ideogram4Pipeline, {}, ideogram_tokens, pipelines="ideogram4"),
    Case("AutoencoderKLQwenImage", vae_image(diffusers.QwenImageImg2ImgPipeline), diffusers.QwenImagePipeline, {},
         packed(diffusers.QwenImagePipeline)),
    Case("AutoencoderKLQwenImage21", vae_image(diffusers.QwenImage21Pipeline, latent_channels=64),
         diffusers.QwenImage21Pipeline, {}, packed(diffusers.QwenImage21Pipeline)),
    Case("AutoencoderKLWan", wan, diffusers.WanPipeline, {}, as_clip),
    Case("ConsistencyDecoderVAE", noised(diffusers.StableDiffusionImg2ImgPipeline), diffusers.StableDiffusionPipeline,
         {}, drawing),
    Case("VQModel", None, diffusers.KandinskyV22Pipeline, MOVQ),
    Case("VQModel", None, diffusers.Kandinsky3Pipeline, MOVQ),
    Case("VQModel", None, diffusers.LDMTextToImagePipeline),
]  # fmt: skip
BY_FORMULA = {"AutoencoderKLKVAE", "AutoencoderRAE"}  # in test_families.py


def test_every_class_is_compared_with_a_pipeline_or_no_pipeline_has_it() -> None:
    assert {*IMAGES} - {case.name for case in CASES} == BY_FORMULA
    assert not BY_FORMULA & {name for used in families.pipelines().values() for name in used}
    assert {case.pipelines for case in CASES} == {None, *VARIANTS}


@pytest.fixture(autouse=True)
def _as_the_writer_computes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the writer's; and the mean where a pipeline draws."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(vae: Any, folder: Path, pipelines: str | None = None) -> LatentDataset:
    """A store of two images, unrounded, with their pixels."""
    side = geometry_of(vae).side or 32
    write_images(folder / "images", 2, (side, side))
    source = open_images(str(folder / "images"), vae)
    options: Any = {"store": "mean", "dtype": "fp32", "pixels": True, "pipelines": pipelines}
    write_store(vae, source, folder / "store", resolution=side, batch_size=1, **options)
    return LatentDataset(folder / "store", pixels=True)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_store_gives_and_shows_what_pipelines_do(case: Case, tmp_path: Path) -> None:
    vae = tiny(case.name, **case.changes)
    data = stored(vae, tmp_path, case.pipelines)
    item = data[1]
    latents = item["latents"][None]
    if case.encode is not None:
        seen = case.encode(vae, to_pixels(item["pixels"])[None])
        assert torch.equal(latents, seen[:, :, 0] if seen.ndim == 5 else seen)
    image = shown(case.decode, vae, **{"latents": latents} | case.variables(vae, latents))
    image = image[:, :, 0] if image.ndim == 5 else image
    ours = data.decode(latents, vae)
    if case.decode is diffusers.LDMTextToImagePipeline:  # multiplies by 1 / scaling_factor, which is rounded
        torch.testing.assert_close(ours, image, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, image)
    assert not torch.equal(data.decode(latents + 0.5, vae), image)


@torch.no_grad()
def test_modular_pipelines_read_the_same(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLFlux2")
    data = stored(vae, tmp_path)
    item = data[0]
    latents = item["latents"][None]
    assert torch.equal(flux3(vae, to_pixels(item["pixels"])[None]), latents)
    same = SimpleNamespace(postprocess=lambda image, **options: image)
    components = SimpleNamespace(vae=vae, image_processor=same, patch_size=2)
    state = PipelineState({"latents": latents})
    flux3_decoders.Flux3DecodeStep()(components, state)
    assert torch.equal(state.values["images"], data.decode(latents, vae))
    # Ideogram's takes them unpatchified, and brings the statistics to that order
    variant = normalisation_of(vae, pipelines="ideogram4")
    z = torch.randn(1, 4, 8, 8)
    tokens = variant.apply(z).unflatten(1, (2, 2, 4)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
    state = PipelineState({"latents": tokens})
    Ideogram4DecodeStep()(components, state)
    assert torch.equal(state.values["images"], vae.decode(variant.undo(variant.apply(z))).sample)


# --- families of pipelines that read FLUX.2's VAE in another way ------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_store_remembers_whose_pipelines_it_is_for(name: str, tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLFlux2")
    for pipelines in (None, name, None):  # nothing is encoded again, and an update without the word keeps it
        data = stored(vae, tmp_path, pipelines)
        wanted = normalisation_of(vae) if pipelines is None and data.normalisation.pipelines is None else None
        assert data.normalisation == (wanted or normalisation_of(vae, pipelines=name))
    assert data.normalisation.pipelines == name
    assert f"for the pipelines {name}" in describe(tmp_path / "store", data.manifest)
    assert Normalisation.from_config(data.normalisation.to_config()) == data.normalisation
    z = torch.randn(3, 4, 6, 8)
    torch.testing.assert_close(data.normalisation.undo(data.normalisation.apply(z)), z)
    assert data.normalisation.apply(z).shape[1:] == data.normalisation.shape((4, 6, 8))
    # what was measured is laid out as those pipelines have it
    raw = torch.stack([LatentDataset(tmp_path / "store", raw=True)[index]["mean"] for index in range(2)])
    measured = LatentDataset(tmp_path / "store", normalisation="channel").normalisation.apply(raw)
    if VARIANTS[name].layout == "none":
        measured = torch.pixel_unshuffle(measured, 2)
    torch.testing.assert_close(measured.mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(measured.var((0, 2, 3), correction=0), torch.ones(16), atol=1e-3, rtol=0)


def test_other_pipelines_have_no_name() -> None:
    with refused(UsageError, "pipelines"):
        normalisation_of(tiny("AutoencoderKLFlux2"), pipelines="flux2")
    with refused(UsageError, "pipelines"):
        normalisation_of(tiny("AutoencoderKL"), pipelines="ideogram4")
    with refused(UsageError, "config"):
        Normalisation.from_config({"scaling_factor": 1.0, "pipelines": ["ideogram4"]})
