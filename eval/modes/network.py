"""A textbook VAE that trains in seconds: perceptrons, a Gaussian latent, and a likelihood of black and white values.

Each value of an image is on or off, and the likelihood is `gaussian_nll` of two levels: p(on) = Phi(output / sigma).

Legend: N images, B batch, c latent dimensions, M points, H W pixels.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core import rng
from ldm_vae.core.progress import Progress
from ldm_vae.demo import factors
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.run.optim import schedule, set_learning_rate
from ldm_vae.training.objective import Objective

WIDTH = 256
LEARNING_RATE = 2e-3  # at the start; it falls along a half cosine
VALUES = 3 * factors.SIDE**2


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; smooth, so that an integral over its input converges."""
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs)
    )


class Network(nn.Module):
    """Encoder and decoder around c latent dimensions at one position."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.encoder, self.decoder = perceptron(VALUES, 2 * dimensions), perceptron(dimensions, VALUES)

    def encode(self, images: torch.Tensor) -> Moments:
        """Images [B, 3, H, W] in [-1, 1] => moments [B, c, 1, 1]."""
        return Moments.from_parameters(self.encoder(images.flatten(1))[:, :, None, None])

    def forward(self, images: torch.Tensor, noise: torch.Tensor, images_seen: int) -> Reconstruction:
        moments = self.encode(images)
        z = moments.sample(noise)
        pixels = self.decoder(z.flatten(1)).view_as(images)
        return Reconstruction(images, pixels, images, moments, z, z.detach(), images_seen=images_seen)


def pixels() -> torch.Tensor:
    """Every image of the data [N, 3, H, W], -1 or 1."""
    return (factors.images() > 0).float() * 2 - 1


def train(dimensions: int, beta: float, images: int, batch: int, seed: int) -> tuple[Network, float]:
    """Network trained on `images` draws from the true distribution, and the sigma of its likelihood."""
    everything, probabilities = pixels(), factors.probabilities()
    objective = Objective({"likelihood": GaussianNLL(levels=2, logvar=-2.0), "kl": KL(weight=beta)})
    with rng.seeded(seed):
        network = Network(dimensions)
    optimizer = torch.optim.Adam([*network.parameters(), *objective.parameters()])
    order = torch.Generator().manual_seed(seed)
    for step in Progress(range(images // batch), desc=f"beta {beta:g}, seed {seed}", unit="step", leave=False):
        seen = step * batch
        set_learning_rate(optimizer, LEARNING_RATE * schedule(seen, 0, images, "cosine"))
        chosen = everything[torch.multinomial(probabilities, batch, replacement=True, generator=order)]
        r = network(chosen, posterior_noise(seed, range(seen, seen + batch), (dimensions, 1, 1)), seen)
        total = objective.pixel_terms(r.pixels, r, seen)[0] + objective.latent_terms(r, seen)[0]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    sigma = float(objective.terms["likelihood"].figures()["sigma"])  # type: ignore[operator]
    return network.eval().requires_grad_(False), sigma


class Likelihood:
    """log p(x|z) of images [N, 3, H, W] by a trained network, in nats and fp64.

    A value that is on counts log Phi(output / sigma), one that is off log Phi(-output / sigma).
    """

    def __init__(self, network: Network, sigma: float, images: torch.Tensor) -> None:
        self.decoder, self.sigma = copy.deepcopy(network.decoder).double(), sigma
        self.is_on = (images.flatten(1) > 0).double()

    def _logs(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z [M, c] => log p of an image without a value that is on [M], and what each that is adds [M, values]."""
        outputs = self.decoder(z.double()) / self.sigma
        off = torch.special.log_ndtr(-outputs)
        return off.sum(dim=1), torch.special.log_ndtr(outputs) - off

    def everywhere(self, z: torch.Tensor) -> torch.Tensor:
        """Of every image at every z [M, c] => [M, N]."""
        none, more = self._logs(z)
        return torch.addmm(none[:, None], more, self.is_on.T)

    def each(self, z: torch.Tensor) -> torch.Tensor:
        """Of each image at its own z [N, c] => [N]."""
        none, more = self._logs(z)
        return none + (more * self.is_on).sum(dim=1)
