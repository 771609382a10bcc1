"""A diffusers folder is what it was asked to be, is compared before it is published, and never half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from safetensors import safe_open
from sentences import refused

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.export import diffusers_folder
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.measurement import (
    Images,
    is_store,
    measure,
    statistics_of_store,
)

KINDS = {
    "scale": Normalisation(0.9),
    "shift": Normalisation(0.9, 0.1),
    "channel": Normalisation(1.0, None, (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_normalisation_is_written(kind: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    tiny_vae.register_to_config(shift_factor=7.0)  # a left-over that must not survive
    write_vae(tiny_vae, tmp_path / "vae", KINDS[kind], sample_size=64)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert {key: config[key] for key in KINDS[kind].to_config()} == KINDS[kind].to_config()
    assert config["sample_size"] == 64
    assert not [key for key in config if key.startswith("_name_or_path")]
    assert (
        tiny_vae.config.shift_factor == 7.0 and tiny_vae.config.scaling_factor == 1.0
    )  # the caller's model is as it was


def test_the_folder_is_what_diffusers_loads(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_vae(tiny_vae, tmp_path / "vae", KINDS["scale"])
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in tiny_vae.state_dict().items())
    with safe_open(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "vae").iterdir()}
    assert len(modes) == 1  # the weights are as readable as the config
    assert "library_name: diffusers" in (tmp_path / "vae" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]  # nothing is left beside it


def test_an_older_export_is_replaced_and_a_stranger_is_not(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    out = write_vae(tiny_vae, tmp_path / "vae", KINDS["scale"])
    write_vae(tiny_vae, out, KINDS["shift"])
    assert AutoencoderKL.from_pretrained(out).config.shift_factor == 0.1
    (out / "thesis.txt").write_text("mine")
    with refused(UsageError, "thesis.txt"):
        write_vae(tiny_vae, out, KINDS["scale"])
    assert AutoencoderKL.from_pretrained(out).config.shift_factor == 0.1


def test_a_damaged_write_is_caught_before_it_is_published(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_vae(tiny_vae, tmp_path / "vae", KINDS["shift"])

    def damaged(like: Any, folder: Path, **options: Any) -> Any:
        vae = type(like).from_pretrained(folder)
        vae.decoder.conv_out.bias.data[0] += 1e-6
        return vae

    monkeypatch.setattr(diffusers_folder, "load_folder", damaged)
    with refused(WorkError, "decoder.conv_out.bias"):
        write_vae(tiny_vae, out, KINDS["scale"])
    assert AutoencoderKL.from_pretrained(out).config.shift_factor == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_two_normalisations_in_a_config_are_refused(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    tiny_vae.register_to_config(shift_factor=1.0, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with refused(UsageError, "shift_factor"):
        write_vae(tiny_vae, tmp_path / "vae", None)
    assert not list(tmp_path.iterdir())


# --- measuring --------------------------------------------------------------------------------------------------------


def test_measured_latents_are_standard_after_the_normalisation(tiny_vae: AutoencoderKL) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 32, 32, generator=draw) * 2 - 1
    statistics = measure(tiny_vae, images.split(5), "cpu")
    assert statistics.images == 24
    with torch.no_grad():
        moments = latents.encode(tiny_vae, images)
    z = moments.sample(torch.randn(moments.mean.shape, generator=draw))
    scaled = statistics.normalisation("channel").apply(z)
    assert scaled.mean((0, 2, 3)).abs().max() < 0.05
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 0.05
    # by the definition, in one go
    mean = moments.mean.double().mean((0, 2, 3))
    variance = moments.logvar.double().exp().mean((0, 2, 3)) + moments.mean.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-6, atol=1e-7)  # batches of 5 and of 24 round differently
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-6, atol=1e-7)


def test_no_image_is_an_error(tiny_vae: AutoencoderKL) -> None:
    with refused(WorkError, "image"):
        measure(tiny_vae, [], "cpu")


def test_over_a_folder_of_images(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    everything = measure(tiny_vae, Images(str(image_folder), 32, batch_size=5).batches(tiny_vae), "cpu")
    assert everything.images == 12
    assert [len(batch) for batch in Images(str(image_folder), 32, limit=4).batches(tiny_vae)] == [4]
    with refused(UsageError, "resolution"):
        Images(str(image_folder), 33).batches(tiny_vae)


def test_a_store_hands_over_its_statistics(tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run_cli("encode", tiny_vae_folder, image_folder, store, "--resolution", 32, "--num_workers", 0) == 0
    vae = load_autoencoder(tiny_vae_folder)
    assert is_store(str(store)) and not is_store(str(image_folder))
    found = statistics_of_store(vae, str(store))
    measured = measure(vae, Images(str(image_folder), 32).batches(vae), "cpu")
    assert found.images == 12 and found.intervals is not None
    torch.testing.assert_close(found.mean, measured.mean, rtol=1e-3, atol=1e-4)
    vae.quant_conv.bias += 1
    with refused(UsageError, "stats"):
        statistics_of_store(vae, str(store))


# --- variants and shards ----------------------------------------------------------------------------------------------


def test_half_precision_variant_and_shards(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    out = write_vae(tiny_vae, tmp_path / "vae", KINDS["scale"], half=True, max_shard_size="30KB")
    names = sorted(path.name for path in out.glob("*.safetensors*"))
    assert any("-of-" in name for name in names) and any(".fp16" in name for name in names)
    full = AutoencoderKL.from_pretrained(out)
    half = AutoencoderKL.from_pretrained(out, variant="fp16", torch_dtype=torch.float16)
    for name, value in tiny_vae.state_dict().items():
        assert torch.equal(full.state_dict()[name], value)
        assert torch.equal(half.state_dict()[name], value.half())
    write_vae(tiny_vae, out, KINDS["scale"])  # the shards go with the older export
    assert [path.name for path in out.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    with refused(UsageError, "max_shard_size"):
        write_vae(tiny_vae, out, KINDS["scale"], max_shard_size="large")
