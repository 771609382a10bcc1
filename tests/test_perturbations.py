"""Perturbations between encoder and decoder: what they do to latents and target, keyed, and nothing at inference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sentences import refused

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.perturbations import Draw
from ldm_vae.perturbations.channel_dropout import Config as ChannelDropout
from ldm_vae.perturbations.eq import Config as Equivariance
from ldm_vae.perturbations.latent_noise import Config as LatentNoise
from ldm_vae.perturbations.teacher_latents import Config as TeacherLatents


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def network(*perturbations: object) -> TrainableAutoencoder:
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    return TrainableAutoencoder(vae, None, [one.build(7) for one in perturbations])


def noise(model: TrainableAutoencoder, positions: range) -> torch.Tensor:
    return posterior_noise(0, positions, model.noise_shape(32, 32))


def test_latents_and_target_turn_and_shrink_alike() -> None:
    part = Equivariance(probability=1.0, scales=(0.5,)).build(7)
    turned = next(seen for seen in range(100) if part.transformation(seen) == (0.5, 1))
    latents, target = torch.randn(1, 4, 16, 8), torch.randn(1, 3, 32, 16)
    draw = Draw(torch.empty(1, 0, 16, 8), target, turned)
    moved, moved_target = part(latents, target, draw)
    small = F.interpolate(latents, (8, 4), mode="bicubic", align_corners=False, antialias=True)
    assert torch.equal(moved, small.rot90(1, (2, 3)))
    assert moved_target.shape == (1, 3, 8, 16) and moved.shape == (1, 4, 4, 8)


def test_the_transformation_is_drawn_by_the_images_seen() -> None:
    config = Equivariance(probability=0.5)
    drawn = [config.build(7).transformation(seen) for seen in range(0, 4000, 2)]
    assert drawn == [config.build(7).transformation(seen) for seen in range(0, 4000, 2)]
    assert drawn != [config.build(8).transformation(seen) for seen in range(0, 4000, 2)]
    moved = [one for one in drawn if one != (1.0, 0)]
    # half of them, but for the sixteenth of those that are drawn as the identity
    assert len(moved) / len(drawn) == pytest.approx(0.5 * 15 / 16, abs=0.04)
    assert {turns for _, turns in moved} == {0, 1, 2, 3} and {scale for scale, _ in moved} == {0.25, 0.5, 0.75, 1.0}


def test_a_transformed_batch_trains_against_the_transformed_image() -> None:
    model = network(Equivariance(probability=1.0, scales=(0.5,), rotate=False))
    r = model(images(), noise(model, range(4)), 3)
    assert r.pixels.shape == r.target.shape == (4, 3, 16, 16)
    expected = F.interpolate(images(), (16, 16), mode="bicubic", align_corners=False, antialias=True)
    assert torch.equal(r.target, expected) and torch.equal(r.images, images())
    assert r.latents.shape == r.moments.mean.shape == (4, 4, 16, 16)
    (r.pixels - r.target).square().mean().backward()
    assert model.vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_noise_is_of_its_size_and_keyed_by_image() -> None:
    for fixed, spread in ((True, 0.3), (False, 0.3 / 3**0.5)):
        model = network(LatentNoise(sigma=0.3, fixed=fixed))
        drawn = noise(model, range(64))
        part, latents = model.perturbations[0], torch.zeros(64, 4, 16, 16)
        own = drawn[:, 4:]
        noisy, target = part(latents, latents, Draw(own, latents, 0))
        assert target is latents
        assert noisy.square().mean().sqrt().item() == pytest.approx(spread, rel=0.05)
        alone, _ = part(latents[:1], latents[:1], Draw(noise(model, range(5, 6))[:, 4:], latents[:1], 0))
        assert torch.equal(alone[0], noisy[5])  # neither neighbours nor the rank matter
    plain = network()
    with_noise = noise(network(LatentNoise()), range(4))
    assert torch.equal(noise(plain, range(4)), with_noise[:, :4])  # the posterior's own noise stays what it was


def test_dropped_channels_are_zero_and_the_rest_keeps_the_mean() -> None:
    part = ChannelDropout(probability=0.25).build(0)
    latents = torch.ones(512, 4, 2, 2)
    dropped, _ = part(latents, latents, Draw(torch.randn(512, 4, 2, 2), latents, 0))
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(dropped.amin(dim=(2, 3)), dropped.amax(dim=(2, 3)))  # whole channels


def test_several_draw_different_noise() -> None:
    model = network(LatentNoise(fixed=True), ChannelDropout(), LatentNoise(fixed=True))
    assert model.noise_shape(32, 32) == (16, 16, 16)
    seen = []
    for part in model.perturbations:
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].noise))
    drawn = noise(model, range(4))
    model(images(), drawn)
    assert torch.equal(torch.cat(seen, dim=1), drawn[:, 4:])


def test_a_change_of_size_comes_last() -> None:
    model = network(Equivariance(probability=1.0, scales=(0.5,)), LatentNoise())
    assert [type(part).__name__ for part in model.perturbations] == ["LatentNoise", "Equivariance"]
    assert model(images(), noise(model, range(4))).pixels.shape == (4, 3, 16, 16)


def test_the_decoder_learns_from_the_teachers_latents(tiny_vae_folder: object) -> None:
    model = network(TeacherLatents(teacher=str(tiny_vae_folder)))
    r = model(images(), noise(model, range(4)))
    r.pixels.sum().backward()
    assert model.vae.encoder.conv_in.weight.grad is None
    assert model.vae.decoder.conv_out.weight.grad.abs().sum() > 0
    assert not [name for name in model.state_dict() if "teacher" in name]
    narrow = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3).build()
    other = TrainableAutoencoder(narrow, None, list(model.perturbations))
    with refused(UsageError, "perturbations.teacher_latents"):
        other(images(), torch.randn(4, 3, 16, 16))
