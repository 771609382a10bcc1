"""Alignment with the network that can be had without a hub, EfficientNet-Lite0 and its real weights: its value is that
of the paper's formulas in numpy, its positions lie where the image's do, its gradient goes where it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage import data as photographs
from torch import nn

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.losses import alignment
from ldm_vae.losses.alignment import Alignment, Config


@pytest.fixture(scope="module")
def term() -> Alignment:
    torch.manual_seed(0)
    return Config(features="efflite0", latent_channels=4).build()


@pytest.fixture(scope="module")
def reconstruction() -> Reconstruction:
    """Of two crops of photographs, higher than wide, by a network of f = 4."""
    crops = [photographs.astronaut()[:96, 160:224], photographs.chelsea()[100:196, 120:184]]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(1)
    vae = AutoencoderConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1).build()
    return TrainableAutoencoder(vae)(images, torch.randn(2, 4, 24, 16))


def resized(features: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear, [D, 7, 7] => [D, h, w], the centres of the outermost pixels within the image."""
    for axis, size in ((1, shape[0]), (2, shape[1])):
        old = features.shape[axis]
        place = ((np.arange(size) + 0.5) * old / size - 0.5).clip(0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (place - low).reshape([-1 if other == axis else 1 for other in range(3)])
        features = features.take(low, axis) * (1 - part) + features.take(high, axis) * part
    return features


def unit(rows: np.ndarray) -> np.ndarray:
    """Vectors along the first axis, each of length 1."""
    return rows / np.linalg.norm(rows, axis=0, keepdims=True)


def test_its_value_is_that_of_the_papers_formulas(term: Alignment, reconstruction: Reconstruction) -> None:
    maps = term.features.network((reconstruction.images + 1) * 127.5).numpy()
    assert maps.shape == (2, 1280, 7, 7)
    weight = term.project.weight.detach().numpy()[:, :, 0, 0]
    marginal, distance = [], []
    for z, features in zip(reconstruction.latents.detach().numpy(), maps, strict=True):
        f, z = resized(features, (24, 16)).reshape(1280, -1), z.reshape(4, -1)
        cosine = (unit(weight @ z) * unit(f)).sum(axis=0)
        marginal.append(np.maximum(1 - 0.5 - cosine, 0).mean())
        chosen = np.round(np.linspace(0, 24 * 16 - 1, 256)).astype(int)
        ours, theirs = unit(z[:, chosen]), unit(f[:, chosen])
        distance.append(np.maximum(np.abs(ours.T @ ours - theirs.T @ theirs) - 0.25, 0).mean())
    assert np.mean(marginal) > 0.1 and np.mean(distance) > 0.01
    assert term(reconstruction).item() == pytest.approx(np.mean(marginal) + np.mean(distance), rel=1e-4)


def test_features_lie_where_the_image_does(
    term: Alignment, reconstruction: Reconstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an image is flat: there, and only there, its features are as like each other as they can be."""
    seen: list[torch.Tensor] = []
    similarities = alignment._similarities
    monkeypatch.setattr(alignment, "_similarities", lambda x: (seen.append(x), similarities(x))[1])
    images = reconstruction.images.clone()
    images[:, :, :48] = 0.0  # the upper half
    term(replace(reconstruction, images=images))
    features = seen[-1]
    assert features.shape == (2, 1280, 24, 16)
    spread = features.std(dim=3).mean(dim=(1, 2)), features[:, :, :6].std(dim=3).mean(dim=(1, 2))
    assert (spread[1] < 0.7 * spread[0]).all()


def test_its_gradient_reaches_encoder_and_projection_and_nothing_else(term: Alignment) -> None:
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images.requires_grad_()
    r = TrainableAutoencoder(vae)(images, torch.randn(2, 4, 16, 16))
    term(replace(r, images=images)).backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0 and term.project.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())
    assert all(parameter.grad is None for parameter in term.features.network.parameters())


def test_the_frozen_network_is_in_no_state_and_stays_as_it_is(term: Alignment, reconstruction: Reconstruction) -> None:
    objective = nn.ModuleDict({"alignment": term})
    assert list(objective.state_dict()) == ["alignment.project.weight"]
    assert [name for name, _ in objective.named_parameters()] == ["alignment.project.weight"]
    before = {name: value.clone() for name, value in term.features.network.state_dict().items()}
    objective.train()
    term(reconstruction)  # batch norms would follow the batch if they were training
    for name, value in term.features.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_grey_images_are_those_of_three_equal_channels(term: Alignment, reconstruction: Reconstruction) -> None:
    grey = reconstruction.images.mean(dim=1, keepdim=True)
    one, three = (term(replace(reconstruction, images=images)) for images in (grey, grey.expand(-1, 3, -1, -1)))
    assert one.item() == pytest.approx(three.item(), rel=1e-6)
