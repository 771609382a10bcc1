"""Every autoencoder class of the installed diffusers: those of images pass one battery, those of clips that of
`test_families_clips.py`, every other is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL, Flux2Pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from images import write_images
from repository import ROOT
from sentences import refused
from tiny_classes import CLASSES, CONFIGS, IMAGES, SOUNDS, TRAINED, VIDEOS, pixels_for, tiny
from torch import nn

from eval import families
from ldm_vae import LatentDataset, load_autoencoder, open_images, write_store
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import check_resolution, geometry_of, some_latents
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import held_by, normalisation_of, own_normalisation
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.training.adaptive_weight import last_layer_gradient


def test_every_class_of_images_has_a_tiny_instance() -> None:
    assert sorted(CONFIGS) == IMAGES


@pytest.mark.parametrize("name", sorted({*CLASSES} - {*IMAGES, *VIDEOS, *SOUNDS}))
def test_a_class_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with refused(UsageError, name):
        load_autoencoder(tmp_path)


def test_the_page_has_the_table_and_the_count() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert f"<!-- python -m eval.families -->\n{families.table()}\n<!-- end -->" in page
    assert families.count() in page
    served, _, existing = families.count().split()[:3]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{served} of the {existing} families of pipelines" in readme


# --- sizes and moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_sizes_are_those_of_an_encode(name: str) -> None:
    vae = tiny(name)
    geometry, pixels = geometry_of(vae), pixels_for(vae)
    with torch.no_grad():
        moments = latents.encode(vae, pixels)
        decoded = latents.decode(vae, moments.mean)
    side = pixels.shape[-1] // geometry.factor
    assert moments.mean.shape == moments.logvar.shape == (2, geometry.latent_channels, side, side)
    assert decoded.shape == pixels.shape and moments.is_point == geometry.is_point


@pytest.mark.parametrize("name", IMAGES)
def test_neighbours_do_not_matter(name: str) -> None:
    vae = tiny(name)
    pixels = pixels_for(vae, 3)
    other = torch.cat([pixels[:1], -pixels[1:]])
    with torch.no_grad():
        one, two = latents.encode(vae, pixels).mean, latents.encode(vae, other).mean
        assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
        assert torch.equal(latents.decode(vae, one)[0], latents.decode(vae, two)[0])


def test_a_network_of_one_size_takes_no_other() -> None:
    vae = tiny("AutoencoderRAE")
    check_resolution(32, vae)
    with refused(UsageError, "resolution"):
        check_resolution(64, vae)


def test_patches_of_latents_are_whole() -> None:
    vae = tiny("AutoencoderKLFlux2")
    check_resolution(36, vae)
    with refused(UsageError, "resolution"):
        check_resolution(34, vae)


# --- normalisation: the lines of diffusers' pipelines -----------------------------------------------------------------


def test_flux2_is_normalised_as_its_pipeline_does_it() -> None:
    vae = tiny("AutoencoderKLFlux2")
    z = torch.randn(2, 4, 6, 8)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    seen = (Flux2Pipeline._patchify_latents(z) - mean) / std
    found = normalisation_of(vae)
    assert torch.equal(found.apply(z), seen) and found.shape((4, 6, 8)) == seen.shape[1:]
    assert torch.equal(found.undo(seen), Flux2Pipeline._unpatchify_latents(seen * std + mean))


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"])
def test_clips_are_normalised_as_their_pipelines_do_it(name: str) -> None:
    vae = tiny(name)
    z = torch.randn(2, vae.config.z_dim, 1, 4, 4)
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    divides = name == "AutoencoderKLQwenImage21"
    seen = (z - mean) / std if divides else (z - mean) * (1.0 / std)
    found = normalisation_of(vae)
    assert torch.equal(found.apply(z[:, :, 0]), seen[:, :, 0])
    back = seen * std + mean if divides else seen / (1.0 / std) + mean
    assert torch.equal(found.undo(seen[:, :, 0]), back[:, :, 0])


def test_sdxl_is_normalised_as_its_pipeline_does_it() -> None:
    mean, std, scale = [0.1, -0.2, 0.3, 0.0], [3.0, 0.7, 1.1, 2.0], 0.13025
    vae = tiny("AutoencoderKL", latents_mean=mean, latents_std=std, scaling_factor=scale)
    z, found = torch.randn(2, 4, 4, 4), normalisation_of(vae)
    centre, deviation = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    assert torch.equal(found.apply(z), (z - centre) * scale / deviation)
    assert torch.equal(found.undo(z), z * deviation / scale + centre)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("AutoencoderDC", {}, Normalisation(0.41407)),
        ("AutoencoderKLHunyuanImage", {}, Normalisation(0.75)),
        ("AutoencoderKL", {"scaling_factor": 0.3611, "shift_factor": 0.1159}, Normalisation(0.3611, 0.1159)),
        ("AutoencoderRAE", {"latents_mean": [0.5] * 64, "latents_std": [2.0] * 64}, Normalisation(1.0)),
        ("VQModel", {"norm_type": "spatial", "block_out_channels": [32, 32]}, Normalisation(1.0)),
        ("AutoencoderKLKVAE", {}, None),
    ],
)
def test_laws_of_a_config(name: str, changes: dict[str, Any], expected: Normalisation | None) -> None:
    vae = tiny(name, **changes)
    assert own_normalisation(vae) == expected
    if expected is None:
        with refused(UsageError, "VAE"):
            normalisation_of(vae)


def test_a_config_that_names_none_is_measured(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKL", scaling_factor=None)
    with refused(UsageError, "VAE"):
        normalisation_of(vae)
    vae.save_pretrained(tmp_path / "vae")
    images = write_images(tmp_path / "images", 6)
    assert run_cli("export", tmp_path / "vae", tmp_path / "none") == 2
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--stats", images, "--resolution", 32) == 0
    assert normalisation_of(load_autoencoder(tmp_path / "out")).scaling_factor != 1.0


@pytest.mark.parametrize("name", IMAGES)
def test_a_failed_call_leaves_nothing_behind(name: str) -> None:
    vae = tiny(name)
    pixels = pixels_for(vae)
    with torch.no_grad():
        z = latents.encode(vae, pixels).mean
        decoded = latents.decode(vae, z)
        for wrong, call in ((torch.cat([pixels, pixels], 1), latents.encode), (z[:, 1:], latents.decode)):
            with pytest.raises((RuntimeError, ValueError)):
                call(vae, wrong)
        assert torch.equal(latents.encode(vae, pixels).mean, z) and torch.equal(latents.decode(vae, z), decoded)
        # of another number of images too
        assert latents.encode(vae, pixels[:1]).mean.shape == z[:1].shape


# --- the store, and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_a_store_gives_what_the_pipelines_of_a_class_see(name: str, tmp_path: Path) -> None:
    vae, side = tiny(name), geometry_of(tiny(name)).side or 32
    images = write_images(tmp_path / "images", 3, size=(40, 36))
    source = open_images(str(images), vae)
    kind = None if name == "VQModel" else "mean"
    store, dtype = tmp_path / "store", None if kind is None else "fp32"
    write_store(vae, source, store, resolution=side, batch_size=2, num_workers=0, store=kind, dtype=dtype)
    known = own_normalisation(vae)
    data = LatentDataset(store, normalisation=None if known else "channel", pixels=False)
    item = data[1]
    given = item["indices" if name == "VQModel" else "latents"]
    assert data.shape(1) == given.shape
    with torch.no_grad():
        raw = LatentDataset(store, raw=True)[1][data.manifest.identity.store.replace("moments", "mean")]
        if name == "VQModel":
            expected = latents.decode_indices(vae, raw[None].long())
        else:
            assert torch.equal(given, data.normalisation.apply(raw)) and (known is None or known == data.normalisation)
            expected = latents.decode(vae, raw[None])
    torch.testing.assert_close(data.decode(given, vae), expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in IMAGES if own_normalisation(tiny(name)) is not None])
def test_an_export_is_read_back_with_its_normalisation(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    own = normalisation_of(vae)
    measured = held_by(vae, Normalisation(0.5, patch=own.patch)) if family_of(vae).law != "inside" else own
    for wanted in (None, measured):
        back = load_autoencoder(write_vae(vae, tmp_path / str(wanted is None), wanted))
        found, expected = normalisation_of(back), wanted or own
        assert type(back) is type(vae)
        z = some_latents(vae)
        torch.testing.assert_close(found.apply(z), expected.apply(z), rtol=1e-6, atol=1e-6)
        same = {key: value for key, value in vae.state_dict().items() if not key.startswith("bn.")}
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in same.items())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_the_last_layers_gradient_is_the_textbooks(name: str) -> None:
    vae = tiny(name).double().requires_grad_(True)
    network = TrainableAutoencoder(vae)
    pixels = pixels_for(vae).double()
    found = network(pixels, torch.zeros(2, *network.noise_shape(*pixels.shape[2:]), dtype=torch.float64))
    cotangent = torch.randn(found.pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight: Any = network.last_layer.weight
    (expected,) = torch.autograd.grad(found.pixels, weight, cotangent, retain_graph=True)
    ours = last_layer_gradient(network.last_layer, found.last_calls, found.pixels, cotangent)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.abs().max()) > 0
    found.pixels.sum().backward()  # the graph is still there


def gradients(vae: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    vae.zero_grad()
    moments = latents.encode(vae, pixels)
    (latents.decode(vae, moments.mean).square().mean() + moments.logvar.mean()).backward()
    return {name: value.grad.clone() for name, value in vae.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", [*TRAINED, "VQModel"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    vae = tiny(name).double().requires_grad_(True).train()
    pixels = pixels_for(vae).double()
    plain = gradients(vae, pixels)
    enable_checkpointing(vae)
    assert vae.is_gradient_checkpointing
    again = gradients(vae, pixels)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-10, atol=1e-10)


def test_whole_blocks_are_computed_again() -> None:
    """An attention block's list of projections is a part of it: alone, it would leave the attention in memory."""
    enable_checkpointing(vae := tiny("AutoencoderDC"))
    wrapped = {type(one).__name__ for one in vae.modules() if isinstance(vars(one).get("forward"), partial)}
    assert wrapped == {"ResBlock", "EfficientViTBlock"}


def test_a_decoder_that_draws_noise_is_not_trained() -> None:
    with refused(UsageError, "ConsistencyDecoderVAE"):
        TrainableAutoencoder(tiny("ConsistencyDecoderVAE"))


# --- a class that nobody has heard of ---------------------------------------------------------------------------------


class Invented(ModelMixin, ConfigMixin):
    """An autoencoder of a user's own, as diffusers' are called."""

    @register_to_config
    def __init__(self, width: int = 4, scaling_factor: float = 0.5) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, width, 4, stride=4), nn.ConvTranspose2d(width, 3, 4, stride=4)
        self.tail = nn.Conv2d(3, 3, 1)

    def encode(self, x: torch.Tensor) -> EncoderOutput:
        return EncoderOutput(latent=self.down(x))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.tail(self.up(z)))


class Silent(Invented):
    """One whose encode gives what nobody knows."""

    def encode(self, x: torch.Tensor) -> Any:
        return {"codes": self.down(x)}


def test_an_unknown_class_works_by_default(tmp_path: Path) -> None:
    Invented().save_pretrained(tmp_path / "vae")
    vae = load_autoencoder(tmp_path / "vae")
    assert type(vae) is Invented and geometry_of(vae).factor == 4 and normalisation_of(vae) == Normalisation(0.5)
    images = write_images(tmp_path / "images", 3)
    write_store(vae, open_images(str(images), vae), tmp_path / "store", resolution=32, num_workers=0)
    assert LatentDataset(tmp_path / "store")[0]["latents"].shape == (4, 8, 8)
    network = TrainableAutoencoder(vae.requires_grad_(True))
    assert network.last_layer is vae.tail


def test_a_class_that_gives_no_latents_is_refused(tmp_path: Path) -> None:
    Silent().save_pretrained(tmp_path)
    with refused(UsageError, "encode"):
        geometry_of(load_autoencoder(tmp_path))


def test_an_autoencoder_kl_is_what_it_was() -> None:
    vae = tiny("AutoencoderKL")
    pixels = pixels_for(vae)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        moments = latents.encode(vae, pixels)
        assert isinstance(vae, AutoencoderKL)
        assert torch.equal(moments.mean, posterior.mean) and torch.equal(moments.logvar, posterior.logvar)
