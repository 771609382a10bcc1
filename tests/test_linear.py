"""The linear code against numpy's principal components, the networks that start from it against the code, and what a
training, an evaluation and the monitor make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from fork_server import fork
from images import write_images
from linear_codes import LINEAR, MODEL, code_of, first_loss, in_pixels, pictures, train
from PIL import Image
from safetensors.torch import load_file
from sentences import refused
from torchvision.transforms.v2 import functional
from training_runs import newest, run, run_two, write_config

from eval import reconstruction
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.linear_code import (
    PatchMoments,
    from_patches,
    k_means,
    to_patches,
)
from ldm_vae.autoencoder.linear_init import start_linear
from ldm_vae.core.errors import UsageError
from ldm_vae.models.flux2 import Config as Flux2Config
from ldm_vae.training.monitor import below_linear
from ldm_vae.training.objective import rate

# --- the code ---------------------------------------------------------------------------------------------------------


def test_patches_and_back() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = to_patches(images, 4)
    assert torch.equal(patches[1, 1, 2].view(4, 4, 3), images[1, :, 4:8, 8:12].permute(1, 2, 0))
    assert torch.equal(from_patches(patches, 4), images)


@pytest.mark.parametrize(("factor", "channels", "image_channels"), [(2, 5, 3), (4, 8, 3), (8, 4, 1)])
def test_the_code_is_numpys(factor: int, channels: int, image_channels: int) -> None:
    images = pictures(channels=image_channels)
    rows = to_patches(in_pixels(images), factor).flatten(0, 2).numpy()
    _, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    kept = vectors[:, ::-1][:, :channels]
    expected = rows.mean(0) + (rows - rows.mean(0)) @ kept @ kept.T
    code = code_of(images, factor, channels)
    z = code.encode(in_pixels(images))
    found = to_patches(code.decode(z), factor).flatten(0, 2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-8)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(channels).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.var(dim=(0, 2, 3), correction=0), torch.ones(channels).double(), atol=1e-6, rtol=0)


def test_sums_do_not_depend_on_order_or_batches() -> None:
    images = pictures()
    whole, parts = PatchMoments(4, 3), [PatchMoments(4, 3), PatchMoments(4, 3)]
    whole.update(images)
    for number, batch in enumerate(images.flip(0).split(5)):
        parts[number % 2].update(batch)
    assert torch.equal(whole.products, parts[0].products + parts[1].products)


def test_a_code_that_cannot_be_is_one_sentence() -> None:
    with refused(UsageError, "model.latent_channels"):
        code_of(pictures(), 2, 13)
    with refused(UsageError, "data"):
        code_of(torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), 2, 4)


def test_k_means_finds_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]).double()
    draw = torch.Generator().manual_seed(0)
    vectors = (centres[torch.arange(300) % 3] + 0.1 * torch.randn(300, 2, generator=draw)).double()
    book = k_means(vectors, 12, seed=0)
    assert torch.cdist(vectors, book).min(dim=1).values.square().mean() < 0.01
    assert torch.equal(book, k_means(vectors, 12, seed=0))
    assert len(k_means(vectors[:2], 5, seed=0)) == 5


# --- networks ---------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "f4": {"latent_channels": 8, "block_out_channels": (48, 64, 64), "norm_num_groups": 4},
    "f4, other widths": {"latent_channels": 4, "block_out_channels": (32, 48, 96), "norm_num_groups": 2},
    "f2, attention": {"latent_channels": 4, "block_out_channels": (32, 32), "mid_block_add_attention": True},
    "f4, attention": {"latent_channels": 8, "block_out_channels": (48, 64, 64), "attention_levels": (1, 2)},
    "FLUX.2": {"latent_channels": 8, "block_out_channels": (48, 64, 64), "decoder_block_out_channels": (64, 64, 96)},
    "f8, two layers": {"latent_channels": 4, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2},
    "f8, sixteen": {"latent_channels": 16, "block_out_channels": (48, 128, 160, 160), "norm_num_groups": 2},
    "no quant convs": {"block_out_channels": (32, 48), "use_quant_conv": False, "use_post_quant_conv": False},
    "one channel": {"latent_channels": 3, "in_channels": 1, "block_out_channels": (16, 32, 32), "norm_num_groups": 2},
    "f1": {"latent_channels": 3, "block_out_channels": (32,)},
}


def built(shape: dict[str, Any]) -> AutoencoderKL:
    defaults = {"layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
    torch.manual_seed(0)
    config = Flux2Config if "decoder_block_out_channels" in shape else AutoencoderConfig
    return config(**defaults | shape).build()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_first_forward_is_the_code(name: str) -> None:
    vae = built(SHAPES[name]).eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    images = pictures(channels=vae.config.in_channels)
    code = code_of(images, factor, vae.config.latent_channels)
    start_linear(vae, code)
    moments = latents.encode(vae, in_pixels(images).float())
    z = code.encode(in_pixels(images)).float()
    assert (moments.mean - z).norm() < 0.01 * z.norm()
    assert torch.allclose(moments.logvar, torch.tensor(-7.0))
    # the decoder: of what the code itself loses, it loses no tenth more, and nothing at the borders
    linear, ours = code.decode(z), latents.decode(vae, z).double()
    error = (ours - linear).square()
    lost = (linear - in_pixels(images)).square().mean()
    assert error.mean() < max(0.1 * lost, 2e-4)
    assert error[..., -1].mean() < 3 * error.mean() + 1e-5
    assert error[..., -1, :].mean() < 3 * error.mean() + 1e-5


@torch.no_grad()
def test_a_narrow_decoder_leaves_out_the_smallest_components() -> None:
    images, errors = pictures(), []
    for width in (24, 32, 48):
        vae = built(SHAPES["f4"] | {"block_out_channels": (width, 64, 64)}).eval()
        code = code_of(images, 4, 8)
        start_linear(vae, code)
        z = code.encode(in_pixels(images))
        errors.append(float((latents.decode(vae, z.float()).double() - code.decode(z)).square().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ({"block_out_channels": (16, 32, 64), "norm_num_groups": 8}, "norm_num_groups"),
        ({"block_out_channels": (64, 32), "latent_channels": 12, "norm_num_groups": 8}, "block_out_channels"),
        ({"block_out_channels": (64, 8, 64, 64), "latent_channels": 4}, "block_out_channels"),
    ],
)
def test_what_has_no_room_is_one_sentence(shape: dict[str, Any], field: str) -> None:
    vae = built(shape)
    code = code_of(pictures(), 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels)
    with refused(UsageError, field):
        start_linear(vae, code)


def test_every_weight_has_a_gradient() -> None:
    vae = built(SHAPES["f4"] | {"mid_block_add_attention": True})
    images = pictures(8)
    start_linear(vae, code_of(images, 4, 8))
    train(vae, images, 3, 1e-4)
    silent = [name for name, parameter in vae.named_parameters() if not bool((parameter.grad != 0).any())]
    # a key's bias moves all of a query's scores alike, and the softmax takes no notice
    assert [name for name in silent if not name.endswith("to_k.bias")] == []
    rows = [
        name
        for name, parameter in vae.named_parameters()
        if parameter.ndim == 4 and not bool((parameter.grad.flatten(1) != 0).any(dim=1).all())
    ]
    assert rows == []


@pytest.mark.slow
def test_training_from_the_code_leaves_as_many_units_alive_as_from_noise() -> None:
    images = pictures(8)
    active, alive = {}, {}
    for start, learning_rate in (("noise", 1e-3), ("linear", 1e-4)):
        vae = built(SHAPES["f4"])
        if start == "linear":
            start_linear(vae, code_of(images, 4, 8))
        train(vae, images, 20, learning_rate)
        active[start] = int(rate(latents.encode(vae, in_pixels(images).float()), images)["active_units"])
        alive[start] = hidden_units(vae, in_pixels(images).float())
    assert active == {"noise": 8, "linear": 8}
    # the constants of four norms, two channels in each of their 4 groups, are biases and are meant to differ nowhere
    assert alive["linear"] >= alive["noise"] - 4 * 2 * 4


@torch.no_grad()
def hidden_units(vae: AutoencoderKL, x: torch.Tensor) -> int:
    """Channels in front of a convolution (behind norm and SiLU) that differ between places or images."""
    found = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal found
        found += int((inputs[0].transpose(0, 1).flatten(1).std(dim=1) > 1e-4).sum())

    hooks = [module.register_forward_pre_hook(count) for module in vae.modules() if isinstance(module, torch.nn.Conv2d)]
    vae(x)
    for hook in hooks:
        hook.remove()
    return found


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("linear") / "images", 11)


@pytest.mark.slow
def test_a_training_starts_from_the_code_and_resumes_without_it(images: Path, tmp_path: Path) -> None:
    noise, linear = tmp_path / "noise", tmp_path / "linear"
    for folder in (noise, linear):
        folder.mkdir()
    short = LINEAR | {"max_train_images": 16}
    assert run(write_config(noise, images, **short | {"init": "noise"})).returncode == 0
    config = write_config(linear, images, **short)
    done = run(config)
    assert done.returncode == 0 and "fitting the linear code on 9" in done.stdout
    assert first_loss(linear / "run") < 0.3 * first_loss(noise / "run")
    again = run(config, "--max_train_images", "24")
    assert again.returncode == 0 and "fitting" not in again.stdout


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights_as_one(images: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        changes = LINEAR | {
            "max_train_images": 4,
            "train_batch_size": 3 if name == "one" else 2,
            "learning_rate": 1e-12,
        }
        config = write_config(tmp_path / name, images, **changes)
        if name == "one":
            assert run(config).returncode == 0
        else:
            run_two(config)
        found.append(load_file(newest(tmp_path / name / "run") / "tensors.safetensors"))
    for name, tensor in found[0].items():
        if name.startswith("autoencoder"):
            torch.testing.assert_close(tensor, found[1][name], atol=1e-9, rtol=0)


@pytest.mark.slow
def test_a_codebook_starts_as_the_codes_of_the_linear_code(images: Path, tmp_path: Path) -> None:
    model = MODEL | {"kind": "vq", "num_vq_embeddings": 64}
    losses = {"l1": {"weight": 1.0}, "commitment": {"weight": 0.25}}
    changes = LINEAR | {"model": model, "losses": losses, "max_train_images": 8}
    config = write_config(tmp_path, images, **changes)
    done = run(config)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["codes/perplexity"] > 20
    assert line["loss/l1"] < 0.15


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"init_from": "somewhere"}, "init"),
        *(
            ({"model": {"kind": kind}, "losses": {"l1": {"weight": 1.0}}}, f"oobleck or causal_oobleck, got {kind}")
            for kind in ("tiny", "dc", "asymmetric", "hunyuan_image", "ltx", "vidtok")
        ),
        (
            {
                "model": MODEL | {"kind": "vq", "quantizer": {"distance": "cosine"}},
                "losses": {"l1": {"weight": 1.0}, "commitment": {"weight": 0.25}},
            },
            "init",
        ),
        ({"model": MODEL | {"norm_num_groups": 16}}, "norm_num_groups"),
    ],
)
def test_a_config_that_cannot_start_linear_is_one_sentence(
    images: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    done = run(write_config(tmp_path, images, **LINEAR | changes))
    assert done.returncode in (1, 2) and field in done.stderr and "Traceback" not in done.stderr


# --- the floor --------------------------------------------------------------------------------------------------------


def test_an_evaluation_tells_what_a_linear_code_reaches(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 12)
    rows = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in sorted(folder.iterdir())]
    crops = functional.center_crop(torch.stack(rows), [40, 40])
    vae = built(SHAPES["f4"])
    start_linear(vae, code_of(crops, 4, 8))
    vae.save_pretrained(tmp_path / "vae")
    call = [tmp_path / "vae", folder, "--output", tmp_path / "out", "--resolution", "40", "--metrics", "psnr,ssim"]
    done = fork(reconstruction.main, [*map(str, call), "--num_workers", "0"]).wait()
    assert done.returncode == 0, done.stderr
    assert "PSNR (dB) of a linear code of this size" in done.stdout
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(found["linear_code"]) == {"psnr"}
    assert found["metrics"]["psnr"]["mean"] == pytest.approx(found["linear_code"]["psnr"]["mean"], abs=1.0)


def test_the_monitor_says_what_a_linear_code_beats() -> None:
    floor = {"linear_code/psnr": 30.0, "linear_code/lpips_alex": 0.1}

    def said(psnr: float, lpips: float) -> set[str]:
        return set(below_linear({"validation/psnr": psnr, "validation/lpips_alex": lpips, **floor}, "noise"))

    assert said(29.0, 0.2) == {"below_linear"}
    assert said(31.0, 0.2) == said(29.0, 0.05) == set()
    below = {"validation/psnr": 29.0, "validation/lpips_alex": 0.2, **floor}
    advised = ["init: linear" in below_linear(below, init)["below_linear"] for init in ("noise", "linear")]
    assert advised == [True, False]
    assert below_linear({"validation/psnr": 1.0}, "noise") == {}
