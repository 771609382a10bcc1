"""`eval.speed rae`: operations of an update of AutoencoderRAE's decoder, beside diffusers' train_autoencoder_rae.py.

That script (examples/research_projects/autoencoder_rae of diffusers) encodes each batch, decodes it and takes the mean
absolute error; with `--use_encoder_loss`, as its README starts it, it also compares features: the encoder is run on the
images once more, and on the reconstructions with a gradient. It has neither LPIPS nor a discriminator.

The shape is the published one of 256 px, one image, counted on tensors without content. Contenders of one objective are
compared with each other: `l1` alone, and `lpips_gan`, L1 with LPIPS-vgg and a PatchGAN.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderRAE
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.flop_counter import Cost
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.lpips import Config as LPIPS
from ldm_vae.models.pretrained import Config as Pretrained
from ldm_vae.run.optim import OptimizerConfig, trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.config import learning
from ldm_vae.training.decoder_only import drop_encoder
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

from .train import counted

# nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08: DINOv2 with registers, base, 224 px; a decoder of 256 px
PUBLISHED: dict[str, Any] = {
    "encoder_type": "dinov2", "encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_num_hidden_layers": 12,
    "encoder_input_size": 224, "patch_size": 16, "image_size": 256, "decoder_hidden_size": 1152,
    "decoder_num_hidden_layers": 28, "decoder_num_attention_heads": 16, "decoder_intermediate_size": 4096,
}  # fmt: skip


def run(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    rows: list[dict[str, Any]] = []
    with init_empty_weights():  # of operations the shapes are enough: no weights are drawn
        vae = AutoencoderRAE(**PUBLISHED)
    vae.to_empty(device="cpu")
    for figure, names in (
        ("rae_l1_flops", ("ours", "ours_from_store", "diffusers", "diffusers_with_encoder_loss")),
        ("rae_lpips_gan_flops", ("ours_lpips_gan", "ours_lpips_gan_from_store")),
    ):
        counts = {name: count(vae, name) for name in names}
        counts = {"train_step" if name == names[0] else name: value for name, value in counts.items()}
        rows += counted(figure, counts, "GFLOP", 1e9)
    return rows


def count(vae: AutoencoderRAE, name: str) -> int:
    """FLOPs of one update of a recipe on one image."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):  # transformers draws no weights without content
        vae = copy.deepcopy(vae).requires_grad_(False)
    with fake:
        images = torch.rand(1, 3, vae.decoder_image_size, vae.decoder_image_size)
        step = RECIPES[name](vae)
        with Cost() as cost:
            step(images)
    return int(cost.flops)


Step = Callable[[torch.Tensor], object]


def _ours(vae: Any, from_store: bool, lpips_gan: bool) -> Step:
    network = TrainableAutoencoder(learning(vae, ("*",)), Pretrained().bottleneck(vae))
    if from_store:
        drop_encoder(vae)
    terms = {"l1": L1()} | ({"lpips": LPIPS()} if lpips_gan else {})
    critic = PatchGAN().build() if lpips_gan else None
    networks = [network] if critic is None else [network, critic]
    optimizers = [OptimizerConfig().build(trainable_parameters([one]), 1e-4) for one in networks]
    for optimizer in optimizers:
        optimizer.step = lambda *_: None  # type: ignore[method-assign]  # counts for nothing
    step = TrainingStep(
        Accelerator(cpu=True), network, Objective(terms, outline=True), optimizers[0],
        Adversary(AdversaryConfig(weight=0.5 if lpips_gan else 0.0)), critic, optimizers[-1] if lpips_gan else None,
    )  # fmt: skip

    def update(images: torch.Tensor) -> None:
        stored = None
        if from_store:
            stored = Moments.point(torch.zeros(len(images), *network.latent_shape(*images.shape[2:])))
        noise = torch.zeros(len(images), *network.noise_shape(*images.shape[2:]))
        step(images, noise, 0, stored)

    return update


def _diffusers(vae: Any, encoder_loss: float) -> Step:
    vae.decoder.requires_grad_(True)
    vae.train()

    def features(images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = vae._encoder_forward_fn(vae.encoder, vae._resize_and_normalize(images))
        return tokens

    def update(images: torch.Tensor) -> None:
        decoded = vae(images).sample
        loss = F.l1_loss(decoded, images)
        if encoder_loss:
            with torch.no_grad():
                wanted = features(images)  # a second time: what was encoded is not kept
            loss = loss + encoder_loss * F.mse_loss(features(decoded), wanted)
        loss.backward()

    return update


RECIPES: dict[str, Callable[[Any], Step]] = {
    "ours": lambda vae: _ours(vae, False, False),
    "ours_from_store": lambda vae: _ours(vae, True, False),
    "diffusers": lambda vae: _diffusers(vae, 0.0),
    "diffusers_with_encoder_loss": lambda vae: _diffusers(vae, 0.1),
    "ours_lpips_gan": lambda vae: _ours(vae, False, True),
    "ours_lpips_gan_from_store": lambda vae: _ours(vae, True, True),
}
