"""Every autoencoder class of sounds of the installed diffusers passes the battery of those of images and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import autoencoders
from sentences import refused
from tiny_classes import SOUND_CONFIGS, SOUNDS, pixels_for, sounds_for, tiny
from torch.nn.utils import parametrize, remove_weight_norm

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.fine_tuning import encoder_parts, is_encoders
from ldm_vae.autoencoder.geometry import check_resolution, geometry_of, latent_size
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import held_by, normalisation_of, own_normalisation, take_away
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.training.adaptive_weight import last_layer_gradient

AS_IT_IS = ["AutoencoderOobleck", "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae"]
POINTS = ["AutoencoderSAME", "LongCatAudioDiTVae"]


def test_every_class_of_sounds_has_a_tiny_instance() -> None:
    assert sorted(SOUND_CONFIGS) == SOUNDS


# --- sizes and moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUNDS)
def test_sizes_are_those_of_an_encode(name: str) -> None:
    vae = tiny(name)
    geometry, sounds = geometry_of(vae), sounds_for(vae)
    with torch.no_grad():
        moments = latents.encode(vae, sounds)
        decoded = latents.decode(vae, moments.mean)
    assert moments.mean.shape == moments.logvar.shape == (2, geometry.latent_channels, 16)
    assert moments.mean.shape[1:] == latent_size(vae, sounds.shape[2]) and decoded.shape == sounds.shape
    assert moments.is_point == geometry.is_point == (name in POINTS)
    assert decoded.dtype == moments.mean.dtype == torch.float32


@pytest.mark.parametrize("name", ["AutoencoderOobleck", "AutoencoderSAME", "AutoencoderKLKVAEAudio"])
def test_the_hop_of_a_published_size_is_its_own(name: str) -> None:
    with torch.device("meta"):
        vae = getattr(autoencoders, name)()
    said = vae.downsampling_ratio if name == "AutoencoderSAME" else vae.hop_length
    assert geometry_of(vae).factor == said > 500


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_is_encoded_as_its_class_does_it(name: str) -> None:
    vae = tiny(name)
    sounds = sounds_for(vae, 1)
    more = {"sample_posterior": False} if name == "LongCatAudioDiTVae" else {}
    with torch.no_grad():
        moments, encoded = latents.encode(vae, sounds), vae.encode(sounds, **more)
        found = encoded.latents if name in POINTS else encoded.latent_dist
        assert torch.equal(moments.mean, found if name in POINTS else found.mode())
        if name not in POINTS:
            torch.testing.assert_close(moments.logvar.exp().sqrt(), found.std, rtol=1e-5, atol=1e-7)
        assert torch.equal(latents.encode(vae, sounds).mean, moments.mean)
        decoded = vae.decode(moments.mean)
        plain = decoded if torch.is_tensor(decoded) else decoded.sample
        assert torch.equal(latents.decode(vae, moments.mean), plain)


@pytest.mark.parametrize("name", SOUNDS)
def test_neighbours_do_not_matter(name: str) -> None:
    """Cosmos3's own encode divides by the peak of the batch."""
    vae = tiny(name)
    sounds = sounds_for(vae)
    other = torch.cat([sounds[:1], -2 * sounds[1:]])
    with torch.no_grad():
        one, two = latents.encode(vae, sounds).mean, latents.encode(vae, other).mean
        assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
        assert torch.equal(latents.decode(vae, one)[0], latents.decode(vae, two)[0])


@pytest.mark.parametrize("name", SOUNDS)
def test_a_length_that_would_not_come_back_is_refused(name: str) -> None:
    vae = tiny(name)
    for samples in (1, 16 * geometry_of(vae).factor + 1):
        with refused(UsageError, "L"):
            latents.encode(vae, torch.zeros(1, geometry_of(vae).in_channels, samples))
        with refused(UsageError, "samples"):
            check_resolution(samples, vae)


def test_strides_that_do_not_come_back_are_refused() -> None:
    with refused(UsageError, "VAE"):
        geometry_of(tiny("AutoencoderOobleck", downsampling_ratios=[2, 5]))


def test_another_signal_is_refused() -> None:
    with refused(UsageError, "encode"):
        latents.encode(tiny("AutoencoderOobleck"), torch.zeros(1, 2, 32, 32))
    image = tiny("AutoencoderKL")
    with refused(UsageError, "encode"):
        latents.encode(image, pixels_for(image)[0])  # a batch [3, C, L], or an image that is no batch


# --- normalisation: the lines of diffusers' pipelines -----------------------------------------------------------------


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_normalised_as_their_pipelines_do_it(name: str) -> None:
    vae = tiny(name)
    z = torch.randn(8, geometry_of(vae).latent_channels, 5, generator=torch.Generator().manual_seed(0))
    if name == "AutoencoderKLKVAEAudio":
        assert own_normalisation(vae) is None
        with refused(UsageError, "VAE"):
            normalisation_of(vae)
        return
    found = normalisation_of(vae)
    if name in AS_IT_IS:  # pipeline_stable_audio.py and its kin take and give z
        assert torch.equal(found.apply(z), z) and torch.equal(found.undo(z), z)
        with refused(UsageError, "normalisation"):
            held_by(vae, Normalisation(0.5, sounds=True))
        return
    mean, std = (torch.tensor(one)[None, :, None] for one in (vae.config.latents_mean, vae.config.latents_std))
    # pipeline_minimax_h3.py; of as many sounds as there are channels
    assert torch.equal(found.apply(z), (z - mean) / std) and torch.equal(found.undo(z), z * std + mean)
    assert torch.equal(found.apply(z[0]), found.apply(z)[0]) and found.shape((8, 5)) == (8, 5)
    with refused(UsageError, "normalisation"):
        found.apply(z[:, :3])
    take_away(vae)
    with refused(UsageError, "VAE"):
        normalisation_of(vae)


@pytest.mark.parametrize("name", SOUNDS)
def test_an_export_is_read_back_with_its_normalisation(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    own, sounds = own_normalisation(vae), sounds_for(vae, 1)
    back = load_autoencoder(write_vae(vae, tmp_path / "out", None))
    assert type(back) is type(vae) and own_normalisation(back) == own
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in vae.state_dict().items())
    with torch.no_grad():
        assert torch.equal(latents.encode(back, sounds).mean, latents.encode(vae, sounds).mean)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUNDS)
def test_the_encoders_side_is_what_no_decode_needs(name: str) -> None:
    vae = tiny(name)
    decoders = {key for key, _ in vae.named_parameters() if not is_encoders(key)}
    ahead = tuple(f"{one}." for one in encoder_parts(vae))
    assert decoders == {key for key, _ in vae.named_parameters() if not key.startswith((*ahead, "bottleneck."))}


def plain(layer: Any) -> None:
    """Make a weight-normed layer one whose weight is a parameter."""
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    elif hasattr(layer, "weight_g"):
        remove_weight_norm(layer)


@pytest.mark.parametrize("name", SOUNDS)
def test_the_last_layers_gradient_is_the_textbooks(name: str) -> None:
    """Of the weight that the norm of a weight-normed layer makes: that of the layer without a norm."""
    expected, ours = [], []
    for normed in (True, False):
        vae = tiny(name).double().requires_grad_(True)
        network = TrainableAutoencoder(vae)
        if not normed:
            plain(network.last_layer)
        sounds = sounds_for(vae).double()
        found = network(sounds, torch.zeros(2, *network.noise_shape(*sounds.shape[2:]), dtype=torch.float64))
        assert found.pixels.shape == found.target.shape == sounds.shape and found.frames == 1
        cotangent = torch.randn(found.pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        cotangent = cotangent.to(found.pixels)
        if not normed:
            weight: Any = network.last_layer.weight
            expected += torch.autograd.grad(found.pixels, weight, cotangent, retain_graph=True)
        ours.append(last_layer_gradient(network.last_layer, found.last_calls, found.pixels, cotangent))
        found.pixels.sum().backward()  # the graph is still there
    for gradient in ours:
        torch.testing.assert_close(gradient, expected[0].to(gradient), rtol=1e-6, atol=1e-6)
    assert float(expected[0].abs().max()) > 0


@pytest.mark.parametrize("name", ["AutoencoderKLMiniMaxH3Audio", "Cosmos3AVAEAudioTokenizer"])
def test_a_decode_that_clamps_is_drawn_back(name: str) -> None:
    vae = tiny(name).requires_grad_(True)
    network, sounds = TrainableAutoencoder(vae), sounds_for(vae, 1)
    last: Any = network.last_layer
    with torch.no_grad():
        last.weight_g.fill_(1e6)
    noise = torch.zeros(1, *network.noise_shape(*sounds.shape[2:]))
    pixels = network(sounds, noise).pixels
    with torch.no_grad():
        assert torch.equal(pixels, latents.decode(vae, latents.encode(vae, sounds).mean))
    outside = pixels.abs() == 1.0
    assert bool(outside.any())
    parameter = next(vae.decoder.parameters())
    for sign, learns in ((1.0, True), (-1.0, False)):  # descent shrinks, descent grows
        (gradient,) = torch.autograd.grad((sign * pixels[outside].abs()).sum(), parameter, retain_graph=True)
        assert bool(gradient.any()) == learns


def gradients(vae: Any, sounds: torch.Tensor) -> dict[str, torch.Tensor]:
    vae.zero_grad()
    moments = latents.encode(vae, sounds)
    (latents.decode(vae, moments.mean).square().mean() + moments.logvar.mean()).backward()
    return {name: value.grad.clone() for name, value in vae.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", SOUNDS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    vae = tiny(name).double().requires_grad_(True).train()
    sounds = sounds_for(vae, 1).double()
    plainly = gradients(vae, sounds)
    enable_checkpointing(vae)
    assert vae.gradient_checkpointing
    again = gradients(vae, sounds)
    assert plainly.keys() == again.keys()
    for key, value in plainly.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-8)
