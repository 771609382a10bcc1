"""The smallest networks of each kind, with random weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import VQModel
from torch import nn

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.autoencoder.weights.ldm_keys import to_ldm_name
from ldm_vae.models.vq import Config as VQModelConfig

SHAPE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def to_ldm(tensors: Mapping[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """An AutoencoderKL's state dict in LDM's names, its matrices as 1x1 convolutions."""
    return {
        to_ldm_name(name, blocks): tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


class TinyLPIPS(nn.Module):
    """The shape of the lpips package's network, small and random."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = nn.Identity()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)])
        self.lins = nn.ModuleList([nn.Conv2d(8, 1, 1, bias=False) for _ in self.body])
        for linear in self.lins:
            linear.weight.data.abs_()

    def net(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x := torch.relu(layer(x)) for layer in self.body]


def network(codes: bool, quantizer: str = "vq", alpha: bool = False) -> TrainableAutoencoder:
    torch.manual_seed(5)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    if not codes:
        return TrainableAutoencoder(AutoencoderConfig(**shape, in_channels=3 + alpha).build(), alpha=alpha)
    settings = VQModelConfig(
        **shape,
        num_vq_embeddings=16,
        quantizer={"kind": quantizer} | ({"codebook": "learned"} if quantizer == "vq" else {}),
    )
    vae = settings.build()
    return TrainableAutoencoder(vae, settings.bottleneck(vae))


def vq_model(codes: int = 32) -> VQModel:
    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_vq_embeddings=codes,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.quantize.embedding.weight.data.normal_()  # its own start is so narrow that nearly all take one code
    return vae.eval().requires_grad_(False)
