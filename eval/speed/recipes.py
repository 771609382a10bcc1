"""Training steps to measure ours against: each does one generator and one discriminator update on the same network,
terms and batch. They are short forms of published recipes, with what costs time and memory in them kept:

- latent_diffusion: CompVis' AutoencoderKL under Lightning. `training_step` runs twice, so the autoencoder is run twice
  and LPIPS again for the discriminator; two retained backward passes for the adaptive weight.
- diffusers_published: train_autoencoderkl.py. Generator and discriminator take alternate batches, LPIPS stands under
  no_grad, the discriminator's loss goes back through the autoencoder.
- diffusers_repaired: the same with the gradient of LPIPS.
- shared_forward: what one writes first. One forward for both sides, the textbook adaptive weight.
- autoencoder_only: forward and backward of the autoencoder with L1, the floor.
- train_step, small_gpu: ldm_vae.training.step.TrainingStep; the second with the savings of
  configs/profiles/small_gpu.yaml.
- decoder_from_store: ldm_vae.training.step.TrainingStep without an encoder, on stored moments (`latent_store` of a
  config).

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.lpips import Config as LPIPSConfig
from ldm_vae.perceptual.lpips import LPIPS, SMALLEST
from ldm_vae.run.optim import OptimizerConfig
from ldm_vae.training.adaptive_weight import EPSILON, LARGEST
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.decoder_only import drop_encoder
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Workload:
    """The work of every recipe: an f8 network of these widths and a batch. The default is half of Stable Diffusion's
    width, so that a CPU takes seconds for a step.

    genuine: LPIPS with its own weights; random ones cost the same and need no download.
    compiled: a backend of torch.compile for every network; None is eager.
    precision: what Accelerate casts autoencoder and discriminator to; one for all recipes of a process.
    """

    widths: tuple[int, ...] = (64, 128, 256, 256)
    layers: int = 2
    attention: bool = True
    resolution: int = 128
    batch: int = 2
    net: str = "vgg"
    genuine: bool = False
    critic_width: int = 64
    critic_layers: int = 3
    critic_norm: str = "group"
    groups: int = 32
    compiled: str | None = None
    device: str = "cpu"
    precision: str = "no"
    latent_channels: int = 4
    lpips_weight: float = 1.0
    adversary_weight: float = 0.5
    learning_rate: float = 1e-5
    seed: int = 0

    def images(self) -> torch.Tensor:
        return torch.rand(self.batch, 3, self.resolution, self.resolution, device=self.device) * 2 - 1


class Networks:
    """Autoencoder, LPIPS, discriminator and their optimisers, as a recipe of one's own would hold them."""

    def __init__(self, work: Workload) -> None:
        torch.manual_seed(work.seed)
        self.work = work
        with torch.device(work.device):  # a GPU draws the weights of VGG in no time, a CPU in three seconds
            shape_of_vae = AutoencoderConfig(
                block_out_channels=work.widths,
                layers_per_block=work.layers,
                mid_block_add_attention=work.attention,
                norm_num_groups=work.groups,
                latent_channels=work.latent_channels,
            )
            self.network = TrainableAutoencoder(shape_of_vae.build().train())
            perceptual = LPIPSConfig.model_validate({"net": work.net})
            self.lpips = perceptual.build() if work.genuine else perceptual.outline()
            shape = {"width": work.critic_width, "layers": work.critic_layers, "norm": work.critic_norm}
            critic: nn.Module = PatchGAN.model_validate(shape).build().train()
        if work.device != "cpu":  # tensors without content cannot be moved
            for module in (self.network, critic, self.lpips):
                module.to(work.device)
        if work.compiled is not None:
            for module in (self.network, critic, self.lpips):
                module.compile(backend=work.compiled)
        self.accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision=work.precision, device_placement=False)
        self.model, self.critic = self.accelerator.prepare(self.network, critic)
        self.optimizer = OptimizerConfig().build(self.network.parameters(), work.learning_rate)
        self.critic_optimizer = OptimizerConfig().build(self.critic.parameters(), work.learning_rate)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels, KL per pixel value), with fresh noise as these recipes draw it."""
        noise = torch.randn(len(images), *self.network.latent_shape(*images.shape[2:]), device=images.device)
        reconstruction = self.model(images, noise)
        return reconstruction.pixels, reconstruction.moments.kl().sum() / images.numel()

    def adaptive(
        self, images: torch.Tensor, reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor
    ) -> torch.Tensor:
        """The textbook weight: two backward passes to the last layer that keep every graph."""
        last = self.network.last_layer.weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (reconstruction_loss, generator_loss)
        ]
        largest = LARGEST / math.prod(images.shape[1:])  # on means, as in ldm_vae.training.adaptive_weight
        return (norms[0] / (norms[1] + EPSILON)).clamp(0, largest).detach() * self.work.adversary_weight

    def update_autoencoder(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def update_critic(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        loss = 0.5 * (F.relu(1 - self.critic(real)).mean() + F.relu(1 + self.critic(fake)).mean())
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()


Step = Callable[[torch.Tensor], object]


def latent_diffusion(networks: Networks) -> Step:
    def step(images: torch.Tensor) -> None:
        # optimizer_idx 0; Lightning freezes the networks whose turn it is not
        networks.critic.requires_grad_(False)
        pixels, kl = networks.forward(images)
        reconstruction = F.l1_loss(pixels, images) + networks.lpips(pixels, images)
        generator = -networks.critic(pixels).mean()
        weight = networks.adaptive(images, reconstruction, generator)
        networks.update_autoencoder(reconstruction + KL_WEIGHT * kl + weight * generator)
        networks.critic.requires_grad_(True)
        # optimizer_idx 1: the same function from its start
        networks.network.requires_grad_(False)
        pixels, _ = networks.forward(images)
        networks.lpips(pixels, images)  # computed before the branch, and thrown away
        networks.update_critic(images, pixels.detach())
        networks.network.requires_grad_(True)

    return step


def _diffusers(networks: Networks, lpips_gradient: bool) -> Step:
    def step(images: torch.Tensor) -> None:
        # the generator's batch
        networks.critic.requires_grad_(False)
        pixels, kl = networks.forward(images)
        with torch.set_grad_enabled(lpips_gradient):
            perceptual = networks.lpips(pixels, images)
        reconstruction = F.l1_loss(pixels, images) + perceptual
        generator = -networks.critic(pixels).mean()
        weight = networks.adaptive(images, reconstruction, generator)
        networks.update_autoencoder(reconstruction + KL_WEIGHT * kl + weight * generator)
        networks.critic.requires_grad_(True)
        # the discriminator's batch, another one there; its loss is carried back through the autoencoder
        pixels, _ = networks.forward(images)
        networks.update_critic(images, pixels)

    return step


def diffusers_published(networks: Networks) -> Step:
    return _diffusers(networks, lpips_gradient=False)


def diffusers_repaired(networks: Networks) -> Step:
    return _diffusers(networks, lpips_gradient=True)


def shared_forward(networks: Networks) -> Step:
    def step(images: torch.Tensor) -> None:
        networks.critic.requires_grad_(False)
        pixels, kl = networks.forward(images)
        reconstruction = F.l1_loss(pixels, images) + networks.lpips(pixels, images)
        generator = -networks.critic(pixels).mean()
        weight = networks.adaptive(images, reconstruction, generator)
        networks.update_autoencoder(reconstruction + KL_WEIGHT * kl + weight * generator)
        networks.critic.requires_grad_(True)
        networks.update_critic(images, pixels.detach())

    return step


def autoencoder_only(networks: Networks) -> Step:
    def step(images: torch.Tensor) -> None:
        pixels, kl = networks.forward(images)
        networks.update_autoencoder(F.l1_loss(pixels, images) + KL_WEIGHT * kl)

    return step


def ours(networks: Networks, accumulation: int = 1, from_store: bool = False) -> Step:
    if from_store:
        drop_encoder(networks.network.vae)
    if accumulation > 1:
        networks.network.vae.enable_gradient_checkpointing()
        networks.lpips = LPIPS(networks.lpips.network, SMALLEST[networks.work.net], chunk=1)
    objective = Objective({"l1": L1(), "kl": KL(weight=KL_WEIGHT)})
    objective.terms["lpips"], objective.configs["lpips"] = (
        networks.lpips,
        LPIPSConfig(weight=networks.work.lpips_weight),
    )
    accelerator = networks.accelerator
    accelerator.gradient_accumulation_steps = accumulation
    optimizers = accelerator.prepare(networks.optimizer, networks.critic_optimizer)
    adversary = Adversary(AdversaryConfig(weight=networks.work.adversary_weight)).to(networks.work.device)
    critic = networks.critic if networks.work.adversary_weight else None
    step = TrainingStep(accelerator, networks.model, objective, optimizers[0], adversary, critic, optimizers[1])

    def run(images: torch.Tensor) -> object:
        noise = torch.randn(len(images), *networks.network.latent_shape(*images.shape[2:]), device=images.device)
        stored = Moments(torch.zeros_like(noise), torch.zeros_like(noise)) if from_store else None
        return step(images, noise, stored=stored)

    return run


def decoder_from_store(networks: Networks) -> Step:
    return ours(networks, from_store=True)


def small_gpu(networks: Networks) -> Step:
    """The profile's way with the same batch: half of it at a time, activations computed again."""
    half = ours(networks, accumulation=2)

    def run(images: torch.Tensor) -> None:
        for part in images.chunk(2):
            half(part)

    return run


Recipe = Callable[[Networks], Step]

RECIPES: dict[str, Recipe] = {
    "train_step": ours,
    "latent_diffusion": latent_diffusion,
    "diffusers_published": diffusers_published,
    "diffusers_repaired": diffusers_repaired,
    "shared_forward": shared_forward,
    "autoencoder_only": autoencoder_only,
    "small_gpu": small_gpu,
    "decoder_from_store": decoder_from_store,
}
